"""`sloth-plugins export`, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
from adapted_models import adapt, load, save_base, tokenizer
from launching import warm

pytestmark = pytest.mark.slow
SLOTH = str(Path(sys.executable).with_name("sloth-plugins"))


def sloth(*words, cwd):
    return warm([SLOTH, *words], cwd)


def test_a_run_is_merged_and_a_second_call_says_what_exists(tmp_path):
    save_base(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapt(load(tmp_path / "base")).save_pretrained(tmp_path / "run" / "checkpoint-3")
    done = sloth("export", "merged", "run", "-o", "out", "--dtype", "float16", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("[!.]*"))
    assert done.stdout == f"out: 7 files, {size / 1e6:.2f} MB\n"
    again = sloth("export", "merged", "run", "-o", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("sloth-plugins: out exists; ")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merged", "nowhere", "-o", "out"], "nowhere is no folder"),
        (["merged", "."], "Missing option"),
        (["gguf", "nowhere", "-o", "out"], ""),
        (["push", "nowhere", "me/tiny"], "nowhere is no folder; export a model first"),
        (["mergd"], "No such command 'mergd'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, said):
    done = sloth("export", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("sloth-plugins: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_commands_cost_the_start_nothing(tmp_path):
    code = "import sys, sloth_plugins.cli; print([name for name in ('torch', 'transformers', 'huggingface_hub', 'gguf') if name in sys.modules])"  # noqa: E501 - one program
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("there", "said"), [([], "no file was written"), (["f16", "q8_0"], "what is in out is whole")])
def test_an_interrupted_gguf_says_what_is_there(tmp_path, there, said):
    code = f"""
import sys
from sloth_plugins import cli
from sloth_plugins.export import gguf
from pathlib import Path

def export(source, out, **_):
    out.mkdir()
    [(out / f"model-{{method}}.gguf").touch() for method in {there}]
    raise KeyboardInterrupt

gguf.export = export
sys.argv = ["sloth-plugins", "export", "gguf", "run", "-o", "out"]
cli.main()
"""
    done = warm(["-c", code], tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith(f"sloth-plugins: stopped; {said}")
    assert all(f"model-{method}.gguf" in done.stderr for method in there)
