"""What a report shows: families, one model of two architectures, verdicts in a plan."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sloth_plugins
from sloth_plugins.patches.conventions import TINY
from sloth_plugins.patching import examine
from sloth_plugins.report import text
from sloth_plugins.selection import parse


def model(*kinds):
    built = [AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY)) for kind in kinds]
    return built[0] if len(built) == 1 else torch.nn.ModuleList(built)


def test_a_patch_goes_by_its_family():
    lines = text(sloth_plugins.patch(model("qwen3"), "1")).splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["qwen:rms_norm", "9", "applied"],
        ["qwen:rope", "2", "applied"],
        ["qwen:glu", "2", "applied"],
        ["qwen:cross_entropy", "1", "applied"],
        ["qwen:blocks", "2", "applied"],
        ["qwen:checkpointing", "1", "applied"],
    ]


def test_two_of_one_family_in_one_model_go_by_their_own_names():
    shown = text(sloth_plugins.patch(model("qwen2", "qwen3"), "1,-qwen2:rope"))
    assert "qwen2:rms_norm       5        applied" in shown
    assert "qwen3:rms_norm       9        applied" in shown
    assert "qwen2:rope           0        off" in shown
    assert "qwen3:rope           2        applied" in shown


def test_a_plan_has_the_matrix_verdict_and_a_report_has_not():
    plan = text(examine(model("gemma2"), parse("1"), dry=True))
    assert "compat matrix: " in plan
    assert "(rms_norm, rope, glu, cross_entropy, blocks" in plan
    assert "compat matrix" not in text(sloth_plugins.patch(model("gemma2"), "1"))


def test_a_selection_for_another_architecture_is_said():
    shown = text(sloth_plugins.patch(model("qwen3"), "phi:layer_norm,qwen2:rope"))
    assert "nothing that is selected is for this model, which is qwen3; it stays stock" in shown
