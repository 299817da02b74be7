"""Runs of a benchmark: in turns, each with its own variables, and what fails in them is told in a line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sloth_plugins import cli
from sloth_plugins.bench import child, report, runs
from sloth_plugins.bench.runs import Task, measure
from sloth_plugins.bench.variants import environment, variants
from sloth_plugins.demo.children import ChildFailed
from sloth_plugins.errors import SlothError

TASK = Task(model="tiny", seq=16, batch=1, lora_r=2, steps=3)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
RESULT = {
    "step_seconds": [1.0, 0.5],
    "losses": [2.0],
    "peak_bytes": 2**30,
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def processes(monkeypatch):
    """Replaces the processes; `answers` maps a variant to what its runs write."""
    started, answers = [], {}

    def run_child(name, command, environment, log, progress):
        variant = command[command.index("--variant") + 1]
        started.append((variant, environment.get("SLOTH_PLUGINS"), command))
        log.write_text("sloth-plugins 0.1.0\n  llama:rope  2  applied\n" if variant == "patched" else "")
        answer = answers.get(variant, RESULT)
        if isinstance(answer, Exception):
            raise answer
        with open(command[command.index("--output") + 1], "w") as file:
            json.dump(answer, file)
        progress(1.0)

    monkeypatch.setattr(runs, "run_child", run_child)
    return started, answers


def bench(*arguments):
    done = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    return done.exit_code, done.output


def test_rounds_go_there_and_back(tmp_path, processes):
    seen = []
    found = measure(TASK, ["stock", "patched", "liger"], 3, "llama", tmp_path, lambda name, done: seen.append(done))
    order = ["stock", "patched", "liger"]
    assert [variant for variant, _, _ in processes[0]] == [*order, *reversed(order), *order]
    assert {flag for variant, flag, _ in processes[0] if variant == "patched"} == {"llama"}
    assert {flag for variant, flag, _ in processes[0] if variant != "patched"} == {None}
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert [(v.name, len(v.runs)) for v in found.variants] == [("stock", 3), ("patched", 3), ("liger", 3)]
    assert found.patches == ["llama:rope"]


def test_what_does_not_fit_is_not_tried_again(tmp_path, processes):
    started, answers = processes
    answers["stock"] = {"failed": "out of memory"}
    found = measure(TASK, ["stock", "patched"], 3, "1", tmp_path)
    assert [variant for variant, _, _ in started].count("stock") == 1
    assert found.variants[0].failed == "out of memory"
    answers["patched"] = answers["stock"]
    with pytest.raises(SlothError, match="every variant ran out of memory; try a smaller --batch"):
        measure(TASK, ["stock", "patched"], 3, "1", tmp_path)


def test_one_gpu_for_all_and_the_flag_for_one():
    inherited = {"SLOTH_PLUGINS": "gemma", "CUDA_VISIBLE_DEVICES": "3,4", "HOME": "/root"}
    for variant in ("stock", "patched", "liger"):
        found = environment(variant, "llama", inherited)
        assert found.get("SLOTH_PLUGINS") == ("llama" if variant == "patched" else None)
        assert (found["CUDA_VISIBLE_DEVICES"], found["HOME"]) == ("3", "/root")


def test_rivals(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found" if name == "liger_kernel" else None)
    assert variants("") == ["stock", "patched"]
    assert variants("liger, liger") == ["stock", "patched", "liger"]
    with pytest.raises(SlothError, match="unsloth is not installed; pip install unsloth"):
        variants("liger,unsloth")
    with pytest.raises(SlothError, match=r"'ligre' is not one of liger, unsloth; did you mean 'liger'\?"):
        variants("ligre")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seq", "65"], "--seq 65: the model takes at most 64 tokens"),
        (["--select", "0"], "selects nothing"),
        (["--select", "lama"], "did you mean 'llama'?"),
        (["--compare", "axolotl"], "is not one of liger, unsloth"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(tmp_path, model, processes, arguments, line):
    code, told = bench("--model", model, "--seq", 16, "--out", tmp_path / "bench", *arguments)
    assert code == 2
    assert line in told
    assert len(told.splitlines()) == 1
    assert processes[0] == []
    assert not (tmp_path / "bench").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    code, told = bench("--model", tmp_path / "none", "--out", tmp_path / "bench")
    assert (code, len(told.splitlines())) == (2, 1)
    assert "no such file or folder" in told


def test_an_earlier_benchmark_stays(tmp_path, model, processes):
    (tmp_path / "bench.json").write_text("mine")
    code, told = bench("--model", model, "--seq", 16, "--out", tmp_path)
    assert (code, len(told.splitlines())) == (2, 1)
    assert "--force" in told
    assert (tmp_path / "bench.json").read_text() == "mine"
    assert bench("--model", model, "--seq", 16, "--out", tmp_path, "--force")[0] == 0
    assert json.loads((tmp_path / "bench.json").read_text())["device"] == "NVIDIA H200"


def test_a_run_that_fails_shows_its_end(tmp_path, model, processes):
    (tmp_path / "log").write_text("Traceback\nRuntimeError: no such kernel\n")
    processes[1]["patched"] = ChildFailed("patched, round 1 of 3", 1, tmp_path / "log")
    code, told = bench("--model", model, "--seq", 16, "--out", tmp_path / "bench")
    assert code == 2
    assert "RuntimeError: no such kernel" in told
    assert "patched, round 1 of 3 failed with exit status 1" in told
    assert not (tmp_path / "bench" / "bench.json").exists()


def test_other_losses_end_with_an_error(tmp_path, model, processes):
    processes[1]["patched"] = RESULT | {"losses": [2.5]}
    code, told = bench("--model", model, "--seq", 16, "--out", tmp_path / "bench", "--rounds", 2)
    assert code == 1
    assert "no ratio: losses differ by 5.0e-01, more than 0.02" in told


def run_child_program(monkeypatch, tmp_path, failure):
    def fail(given):
        raise failure

    monkeypatch.setattr(child, "train", fail)
    command = TASK.command("stock", tmp_path / "run.json")
    monkeypatch.setattr("sys.argv", command[2:])
    assert child.main() == 0
    return json.loads((tmp_path / "run.json").read_text())


def test_a_run_tells_what_it_failed_of(tmp_path, monkeypatch):
    assert run_child_program(monkeypatch, tmp_path, torch.OutOfMemoryError("CUDA")) == {"failed": "out of memory"}
    assert run_child_program(monkeypatch, tmp_path, SlothError("no")) == {"mistake": "no"}
    with pytest.raises(RuntimeError, match="shape"):
        run_child_program(monkeypatch, tmp_path, RuntimeError("shape"))


@pytest.mark.parametrize("name", ["", "config.json"])
def test_four_bits_need_weights(tmp_path, model, name):
    task = Task(model=str(model / name), seq=16, batch=1, lora_r=2, steps=3, load_in_4bit=True)
    given = child.options(task.command("stock", tmp_path / "run.json")[3:])
    with pytest.raises(SlothError, match=r"cannot be loaded in 4 bits: .*no file named"):
        child.adapted(given, "float32")


@pytest.mark.slow
def test_stock_and_patched_on_a_tiny_model(tmp_path, model, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "bench"
    small = ["--seq", 16, "--batch", 1, "--lora-r", 2, "--steps", 3, "--rounds", 1]
    code, told = bench("--model", model, "--out", folder, *small)
    assert code == 0, told
    assert report.ON_CPU in told
    found = json.loads((folder / "bench.json").read_text())
    stock, patched = found["variants"]
    assert len(stock["runs"][0]["losses"]) == 1
    assert patched["losses_agree"]
    assert patched["loss_difference"] < 1e-4
    assert patched["ratio"] is None
    assert patched["verdict"] == "no ratio: one round shows no spread"
    assert {"llama:blocks", "trainer:statistics"} <= set(found["patches"])
    assert found["says_nothing_about_a_card"]
    assert min(stock["peak_bytes"], patched["peak_bytes"]) > 2**26
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png", "logs"]
    assert "applied" not in (folder / "logs" / "stock-1.log").read_text()
