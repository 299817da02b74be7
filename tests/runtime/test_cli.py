"""The command line: what it prints, and one line for every mistake."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sloth_plugins import cli

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def config(tmp_path):
    def write(text=None, **changes):
        content = json.dumps({**CONFIG, **changes}) if text is None else text
        (tmp_path / "config.json").write_text(content)
        return tmp_path

    return write


def test_list_shows_each_patch_with_its_requirement():
    output = invoke("list")
    assert all(word in output for word in ("rms_norm", "rope", "glu", "transformers>=4.57.6", "hidden_act=silu|swish"))
    entries = json.loads(invoke("list", "--json"))
    assert {"architecture": "llama", "patch": "rope", "plugin": "llama"}.items() <= entries[1].items()


def test_list_needs_neither_torch_nor_transformers():
    code = "import sys, sloth_plugins.cli as c; c.main()\n"
    probe = (
        "import sys, atexit\nheavy = {'torch', 'transformers'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "sys.argv = ['sloth-plugins', 'list']\n"
    )
    done = subprocess.run([sys.executable, "-c", probe + code], capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stderr


def test_a_plan_counts_modules_from_the_config_alone(config):
    output = invoke("plan", "--model", config())
    assert "llama:rms_norm       7        applies" in output
    assert "llama:rope           3        applies" in output
    plan = json.loads(invoke("plan", "--model", config() / "config.json", "--select", "llama:rope", "--json"))
    assert [entry["state"] for entry in plan["outcomes"]] == ["off", "applied", "off", "off", "off", "off"]


def test_a_plan_says_why_not(config):
    output = invoke("plan", "--model", config(hidden_act="relu"))
    assert "llama:glu            0        skips    config.hidden_act: needs silu or swish or gelu or " in output
    assert ", found relu" in output


def test_a_plan_of_a_large_model_needs_no_memory(config):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    assert "llama:rms_norm       161" in invoke(
        "plan", "--model", config(**sizes, num_key_value_heads=8, vocab_size=128256)
    )


def test_an_unknown_architecture_is_said_and_is_no_error(config):
    (config() / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "no architecture covers model type 'gpt2'" in invoke("plan", "--model", config('{"model_type": "gpt2"}'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', "did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers refuses the config"),
        ('{"model_type": "llama", "hidden_act": "nonsense"}', "transformers cannot build a llama"),
        ('{"model_type": "llama", "hidden_size": -8}', "sloth-plugins: "),
    ],
)
def test_a_config_that_is_none_gets_one_line(config, text, said):
    output = invoke("plan", "--model", config(text), code=2)
    assert said in output
    assert output.count("sloth-plugins:") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/config.json", "nowhere.json"])
def test_a_path_that_is_not_there_gets_one_line(model):
    assert "no such file or folder" in invoke("plan", "--model", model, code=2)


def test_a_folder_without_a_config_gets_one_line(tmp_path):
    assert "the folder has no config.json" in invoke("plan", "--model", tmp_path, code=2)


def test_a_hub_id_that_cannot_be_reached_gets_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    output = invoke("plan", "--model", "someone/model", code=2)
    assert "the hub answers: no route to the hub" in output
    assert "more" not in output


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_a_selection_that_cannot_be_meant_gets_one_line(config, command):
    assert "did you mean 'rope'" in invoke(command, "--model", config(), "--select", "llama:ropes", code=2)
    assert "empty term" in invoke(command, "--model", config(), "--select", "llama,,", code=2)


def test_a_named_patch_that_cannot_run_is_an_error(config):
    output = invoke("plan", "--model", config(hidden_act="relu"), "--select", "llama:glu", code=2)
    assert "llama:glu was asked for by name and cannot run" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_compares_every_gradient(config, dtype):
    output = invoke("verify", "--model", config(), "--dtype", dtype, "--tokens", "40")
    assert "30 gradients and the loss compared: all within their limits" in output
    assert "relative error against float64" in output


def test_verify_loads_weights_where_there_are_some(config, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    settings = {key: value for key, value in CONFIG.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path / "saved")
    assert "all within their limits" in invoke("verify", "--model", tmp_path / "saved")


def test_verify_fails_where_nothing_can_be_patched(config):
    small = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 96}'
    assert "nothing was patched" in invoke("verify", "--model", config(text=small), code=1)


def test_verify_of_nothing_is_refused(config):
    assert "--select='off' selects nothing" in invoke("verify", "--model", config(), "--select", "off", code=2)


def test_verify_of_a_damaged_or_unfit_model_gets_one_line(config):
    folder = config()
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be loaded" in invoke("verify", "--model", folder, code=2)
    (folder / "model.safetensors").unlink()
    output = invoke("verify", "--model", config(text='{"model_type": "t5"}'), code=2)
    assert "transformers has no language model of model type 't5'" in output
    assert output.count("\n") == 1


def test_the_users_words_are_repeated_as_they_are(config):
    assert "--select='llama:dog:'" in invoke("plan", "--model", config(), "--select", "llama:dog:", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pln"], "did you mean 'plan'"),
        (["plan"], "Missing option '--model'"),
        (["verify", "--model", "x", "--tokens", "1"], "--tokens"),
        (["list", "--frobnicate"], "--frobnicate"),
        (["train"], "a script to run ends in .py"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sloth-plugins", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("sloth-plugins: ")
    assert error.count("\n") == 1


def test_verify_refuses_a_dtype_it_does_not_know(config):
    assert "did you mean 'float16'" in invoke("verify", "--model", config(), "--dtype", "float61", code=2)


def test_doctor_reports_versions_and_runs_every_kernel():
    output = invoke("doctor")
    assert "conflicts      none" in output or "conflict  " in output
    for kernel in ("rms_norm float32", "rope float32", "glu silu float32"):
        assert any(kernel in line and line.rstrip().endswith("ok") for line in output.splitlines()), output


def test_doctor_fails_when_a_kernel_is_wrong(monkeypatch):
    from sloth_plugins import doctor

    wrong = {"kernel": "rope float32", "backend": "triton on cpu", "error": 0.5, "limit": 1e-6, "ok": False}
    monkeypatch.setattr(doctor, "kernel_checks", lambda: [wrong])
    assert "WRONG" in invoke("doctor", code=1)


def test_doctor_reports_a_self_check_that_dies(monkeypatch):
    from sloth_plugins import doctor

    monkeypatch.setattr(doctor, "SELF_CHECK", "sloth_plugins.nowhere")
    output = invoke("doctor", code=1)
    assert "exit code 1" in output
    assert "nowhere" in output


@pytest.mark.slow
def test_the_module_alone_is_doctor_and_a_missing_script_is_one_line():
    flag = dict(os.environ, SLOTH_PLUGINS="lama")
    done = subprocess.run([sys.executable, "-m", "sloth_plugins"], capture_output=True, text=True, env=flag)
    assert done.returncode == 0, done.stderr
    assert "glu silu float32" in done.stdout
    done = subprocess.run([sys.executable, "-m", "sloth_plugins", "gone.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "sloth-plugins: no such script: 'gone.py'\n")
