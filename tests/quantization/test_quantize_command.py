"""`sloth-plugins quantize`, as a user types it."""

import json
import sys
from pathlib import Path

import pytest
from launching import warm
from tiny_models import save_model

pytestmark = pytest.mark.slow
SLOTH = str(Path(sys.executable).with_name("sloth-plugins"))
SMALL = ("--samples", "4", "--length", "32", "--device", "cpu")


def sloth(*words, cwd):
    return warm([SLOTH, *words], cwd)


def test_a_model_is_quantised_and_the_table_says_what_stays(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words of text " * 200)
    done = sloth("quantize", "model", "-o", "out", "--budget", "+12KB", "--data", "text.txt", *SMALL, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert 0 < report["bytes"]["extra"] <= report["bytes"]["budget"] == 12_000
    assert report["data"] == "text.txt"
    assert "stays in 16 bits" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("out: ")
    again = sloth("quantize", "model", "-o", "out", *SMALL, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("sloth-plugins: out exists; ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "-o", "out"], "nowhere is no folder"),
        (["me/nowhere", "-o", "out"], "`hf download me/nowhere` fetches it"),
        (["."], "Missing option"),
        ([".", "-o", "out"], "holds no model"),
        ([".", "-o", "out", "--bugdet", "10%"], "No such option"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, said):
    done = sloth("quantize", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("sloth-plugins: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_under_the_name_and_says_how_to_go_on(tmp_path):
    code = """
import sys
from sloth_plugins import cli
from sloth_plugins.quantization import checkpoint

def quantize(*_, **__):
    raise KeyboardInterrupt

checkpoint.quantize = quantize
sys.argv = ["sloth-plugins", "quantize", "model", "-o", "out"]
cli.main()
"""
    done = warm(["-c", code], tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "sloth-plugins: stopped; the same command goes on from there"
