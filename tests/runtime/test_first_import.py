"""Whatever a process imports first, the patches apply at the seam."""

import re

import pytest
from launching import python, warm

pytestmark = pytest.mark.slow
FIRST = ["import torch", "import peft", "from trl import SFTTrainer", "import sloth_plugins"]
TRAIN = """
from transformers import Trainer, TrainingArguments
from common import model, rows
options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
arguments = TrainingArguments(output_dir="out", max_steps=1, **options)
Trainer(model=model(), args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows(8)]).train()
"""
PREPARE = """
from accelerate import Accelerator
from common import model
Accelerator(cpu=True).prepare(model())
"""


@pytest.mark.parametrize("first", FIRST)
def test_the_patches_apply_at_both_seams(first, tmp_path):
    done = python(f"{first}\n{PREPARE}\n{TRAIN}", tmp_path, flag="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"llama:rms_norm +5 +applied", done.stderr)) == 2, done.stderr


def test_nothing_happens_without_the_flag(tmp_path):
    code = "import torch, sys; print(*sorted(m for m in sys.modules if m.startswith('sloth_plugins')))"
    done = python(code, tmp_path)
    light = ["sloth_plugins", "sloth_plugins._version", "sloth_plugins.autoload", "sloth_plugins.lazy"]
    assert done.stdout.split() == light
    assert done.stderr == ""


def test_the_flag_alone_imports_neither_plugins_nor_torch_extras(tmp_path):
    code = (
        "import torch, sys; print(*(m in sys.modules for m in ('pluggy', 'transformers', 'sloth_plugins.activation')))"
    )
    assert python(code, tmp_path, flag="1").stdout.split() == ["False", "False", "True"]


@pytest.mark.parametrize("flag", ["off", "0"])
def test_off_is_silent(flag, tmp_path):
    done = warm(["-c", f"import torch\n{PREPARE}"], tmp_path, flag=flag)
    assert "sloth-plugins" not in done.stderr + done.stdout
