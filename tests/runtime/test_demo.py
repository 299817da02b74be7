"""The demo's parts, without its trainings."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from sloth_plugins.demo import run, train
from sloth_plugins.demo.children import ChildFailed, fraction_done, run_child
from sloth_plugins.demo.data import first_paragraphs, module_name, standard_library_pairs
from sloth_plugins.demo.prepare import build_tokenizer
from sloth_plugins.demo.results import Run, applied_lines, largest_difference, plot, problems


@pytest.fixture(scope="module")
def pairs():
    return standard_library_pairs()


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return build_tokenizer(pairs[:300], 1024)


def make_run(losses, patched=False, evidence=(), dtype="float32"):
    return Run("LoRA", patched, list(losses), 1.0, [0.1], None, "process RSS", "cpu", dtype, list(evidence))


class TestData:
    def test_thousands_of_real_pairs(self, pairs):
        assert len(pairs) > 2000
        known = next(pair for pair in pairs if pair["instruction"].startswith("What does json.dumps do?"))
        assert "Signature: (obj, *, skipkeys=False" in known["instruction"]
        assert known["response"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")

    def test_nothing_empty_and_nothing_twice(self, pairs):
        for key in ("instruction", "response"):
            texts = [pair[key] for pair in pairs]
            assert all(text.strip() for text in texts)
            assert len(set(texts)) == len(texts)

    def test_same_pairs_in_another_process(self, pairs):
        code = "import json; from sloth_plugins.demo.data import *; print(json.dumps(standard_library_pairs()))"
        environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONWARNINGS": "error"}
        again = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        assert json.loads(again.stdout) == pairs
        assert not again.stderr

    def test_sources_are_parsed_and_never_imported(self, tmp_path):
        text = 'raise SystemExit\ndef f(a, *, b=1) -> int:\n    r"""Say what f does, at some length.\n\n    More."""\n'
        (tmp_path / "module.py").write_text(text)
        (tmp_path / "broken.py").write_text("def f(:")
        (tmp_path / "this.py").write_text(text)
        assert standard_library_pairs(tmp_path) == [
            {
                "instruction": "What does module.f do? Signature: (a, *, b=1) -> int",
                "response": "Say what f does, at some length.\n\nMore.",
            }
        ]

    def test_a_library_without_sources_is_an_error(self, tmp_path):
        with pytest.raises(RuntimeError, match="no documented Python source"):
            standard_library_pairs(tmp_path)

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("json/__init__.py", "json"),
            ("json/decoder.py", "json.decoder"),
            ("antigravity.py", None),
            ("test/test_json.py", None),
            ("_pydecimal.py", None),
            ("config-3.11-x86_64-linux-gnu/python-config.py", None),
        ],
    )
    def test_module_names(self, path, name):
        assert module_name(Path(path)) == name

    def test_paragraphs_are_kept_whole_while_they_fit(self):
        assert first_paragraphs("One.\n\n    Two.\n    ") == "One.\n\nTwo."
        assert first_paragraphs("One.\n\n" + "long " * 400) == "One."
        assert first_paragraphs("long " * 400).endswith("long")


class TestTokenizerAndLabels:
    @pytest.mark.parametrize("text", ["def f(x): return x", "naïve 漢字 🦥\n\ttabs  and spaces "])
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def test_special_tokens_are_single_and_distinct(self, tokenizer):
        ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        assert len(ids) == 3
        assert len(tokenizer) <= 1024

    def test_only_the_response_is_learned(self, tokenizer):
        pair = {"instruction": "What does f do?", "response": "It returns its argument."}
        example = train.encode(tokenizer, pair, 128)
        learned = [token for token in example["labels"] if token != train.IGNORED]
        masked = example["labels"].count(train.IGNORED)
        assert tokenizer.decode(learned) == "It returns its argument.<|end|>\n"
        assert example["input_ids"][masked:] == learned
        prompt = "<|begin|><|user|>\nWhat does f do?<|end|>\n<|assistant|>\n"
        assert tokenizer.decode(example["input_ids"][:masked]) == prompt

    def test_long_pairs_are_cut_and_unlearnable_ones_left_out(self, tokenizer):
        pair = {"instruction": "What does f do?", "response": "word " * 200}
        example = train.encode(tokenizer, pair, 48)
        assert {len(values) for values in example.values()} == {48}
        assert train.encode(tokenizer, pair, 8) is None

    def test_the_training_script_knows_nothing_of_the_patches(self):
        source = run.TRAIN_SCRIPT.read_text().lower()
        assert "sloth" not in source


class TestOutputFolder:
    def test_a_folder_with_other_things_is_refused(self, tmp_path, capsys):
        (tmp_path / "thesis.txt").write_text("years of work")
        assert run.main(tmp_path) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "--force" in message

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "out").write_text("")
        assert run.main(tmp_path / "out", force=True) == 2

    def test_new_empty_and_demo_folders_are_welcome(self, tmp_path):
        assert run.refusal(tmp_path / "new", force=False) is None
        assert run.refusal(tmp_path, force=False) is None
        (tmp_path / run.MARKER).touch()
        (tmp_path / "summary.json").touch()
        assert run.refusal(tmp_path, force=False) is None


class TestChildren:
    def test_a_failing_child_is_reported(self, tmp_path, monkeypatch, capsys):
        program = "import sys; [print('line', i) for i in range(40)]; sys.exit(3)"
        monkeypatch.setattr(sys, "executable", str(failing_python(tmp_path, program)))
        assert run.main(tmp_path / "out") == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(20, 40)]
        assert "prepare failed with exit status 3" in lines[-1]
        assert "prepare.log" in lines[-1]

    def test_progress_is_read_from_the_log(self, tmp_path):
        log, seen = tmp_path / "log", []
        run_child("child", [sys.executable, "-c", "print('step 3/4')"], os.environ, log, seen.append)
        assert seen[-1] == 1.0
        assert fraction_done(log) == 0.75

    def test_status_is_carried(self, tmp_path):
        with pytest.raises(ChildFailed, match="exit status 5"):
            run_child("child", [sys.executable, "-c", "raise SystemExit(5)"], os.environ, tmp_path / "log")

    def test_an_interrupt_ends_the_child_and_its_children(self, tmp_path):
        child = f"""
import os, signal, subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(inner.pid, flush=True)
os.kill({os.getpid()}, signal.SIGINT)
inner.wait()
"""
        log = tmp_path / "log"
        # A shell starts background jobs with SIGINT ignored, and so may be the one that runs the tests.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_child("child", [sys.executable, "-c", child], os.environ, log)
        finally:
            signal.signal(signal.SIGINT, before)
        inner = int(log.read_text().split()[0])
        deadline = time.monotonic() + 10
        while running(inner) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(inner)

    def test_an_interrupted_demo_says_so_in_one_line(self, tmp_path, monkeypatch, capsys):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(run, "run_child", interrupted)
        assert run.main(tmp_path / "out") == 130
        assert capsys.readouterr().err.strip().splitlines()[-1] == "demo interrupted; its processes are ended"

    def test_only_patched_runs_see_the_flag(self, monkeypatch):
        monkeypatch.setenv("SLOTH_PLUGINS", "llama")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        stock, patched = run.environment(False), run.environment(True)
        assert "ACCELERATE_USE_FSDP" not in stock
        assert stock["CUDA_VISIBLE_DEVICES"] == "2"
        assert patched == stock | {"SLOTH_PLUGINS": "1"}


class TestResults:
    def test_evidence_is_the_applied_rows_of_the_report(self, tmp_path):
        log = tmp_path / "log"
        log.write_text(
            "model 1 applied\n"
            "sloth-plugins 0.1.0 (cpu), selection '1'\n"
            "  patch           modules  state    why\n"
            "  llama:rms_norm       9        applied\n"
            "  llama:rms_norm       9        applied\n"
            "  llama:rope           0        skipped  not applied\n"
        )
        assert applied_lines(log) == ["llama:rms_norm       9        applied"]

    def test_equal_runs_pass_when_patches_were_applied(self):
        stock, patched = make_run([2, 1]), make_run([2, 1.0005], True, ["llama:rms_norm 9 applied"])
        assert largest_difference(stock, patched) == pytest.approx(5e-4)
        assert problems([(stock, patched)], require_patches=True) == []

    @pytest.mark.parametrize("losses", [[2, 1.01], [2], [2, float("nan")]])
    def test_differing_losses_fail(self, losses):
        found = problems([(make_run([2, 1]), make_run(losses, True, ["x 1 applied"]))], require_patches=True)
        assert len(found) == 1
        assert "more than 0.001" in found[0]

    def test_bfloat16_is_given_more_room(self):
        stock, patched = make_run([2, 1], dtype="bfloat16"), make_run([2, 1.01], True, ["x 1 applied"], "bfloat16")
        assert problems([(stock, patched)], require_patches=True) == []

    def test_missing_and_misplaced_patches_fail(self):
        found = problems([(make_run([1], evidence=["x 1 applied"]), make_run([1], True))], require_patches=True)
        assert len(found) == 2

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
    def test_plot_is_a_png(self, tmp_path):
        path = tmp_path / "losses.png"
        assert plot(path, [(make_run([2, 1]), make_run([2, 1], True))])
        assert path.read_bytes().startswith(b"\x89PNG")
        assert list(tmp_path.iterdir()) == [path]

    def test_no_matplotlib_no_plot(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not plot(tmp_path / "losses.png", [(make_run([1]), make_run([1], True))])


def test_launch_overrides_the_users_accelerate_config(tmp_path):
    shape = {"tune_steps": 1, "tune_batch": 1, "tune_rate": 0.1, "tune_examples": 1, "sequence": 8}
    command = run.launch_command(tmp_path, {"key": {"device": "cpu", "shape": shape}})
    assert "--cpu" in command
    assert json.loads((tmp_path / "accelerate.json").read_text())["distributed_type"] == "NO"
    assert "--cpu" not in run.launch_command(tmp_path, {"key": {"device": "cuda", "shape": shape}})


def test_peak_memory_names_what_it_measured():
    import torch

    peak = train.peak_memory()
    if torch.cuda.is_available():
        assert peak["what"] == "CUDA memory allocated"
    else:
        assert peak["what"] == "process RSS"
        assert peak["mib"] > 50


def test_script_options_have_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "m", "--data", "d", "--output", "o"])
    options = train.parse_options()
    assert isinstance(options, Namespace)
    assert not options.qlora


def failing_python(folder: Path, program: str) -> Path:
    """An executable that ignores its arguments and runs `program`."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return path


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie that only waits to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
