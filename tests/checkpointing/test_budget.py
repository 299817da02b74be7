"""What the user allows: how it is said, what it comes to, and what a mistake is answered with."""

import pytest
import torch
from counted import Counted
from launching import python
from lora_models import batch, gradients, lora_model

import sloth_plugins
from sloth_plugins.patches.blocks.policy import Policy
from sloth_plugins.patches.checkpointing import backbone
from sloth_plugins.patches.checkpointing.budget import Budget, host_bytes, parse
from sloth_plugins.patches.checkpointing.memory import allowed

SIZES = {
    "24GiB": 24 * 2**30, "24 gib": 24 * 2**30, "1.5GB": 1.5e9, "512MiB": 2**29, "80%": None, "10000000": 1e7,
    "auto": None, " MIN ": None,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_what_can_be_said(text):
    budget = parse(text)
    expected = {"80%": "share", "auto": "auto", " MIN ": "min"}.get(text, "bytes")
    assert budget.kind == expected
    if expected == "bytes":
        assert budget.value == SIZES[text]


@pytest.mark.parametrize("text", ["24", "lots", "-1GiB", "0%", "120%", "24 parsecs", "0GiB", "", "nan%"])
def test_what_cannot(text):
    with pytest.raises(ValueError, match=r"SLOTH_MEMORY=.* is not one of: auto, min, a size such as 24GiB"):
        parse(text)


def test_what_it_comes_to():
    memory = Counted(1000)
    assert [allowed(parse(text), memory) for text in ("auto", "min", "50%", "1GiB")] == [1000, 0, 500, 1000]
    assert allowed(Budget("bytes", 300), memory) == 300


def test_host_memory(monkeypatch):
    for text, expected in ((None, 500), ("0", 0), ("20%", 200), ("90%", 500), ("1GiB", 500), ("min", 0)):
        if text is None:
            monkeypatch.delenv("SLOTH_HOST_MEMORY", raising=False)
        else:
            monkeypatch.setenv("SLOTH_HOST_MEMORY", text)
        assert host_bytes(1000) == expected
    monkeypatch.setenv("SLOTH_HOST_MEMORY", "much")
    with pytest.raises(ValueError, match="SLOTH_HOST_MEMORY='much' is not one of"):
        host_bytes(1000)


@pytest.mark.parametrize("variable", ["SLOTH_MEMORY", "SLOTH_HOST_MEMORY"])
def test_a_mistake_is_one_line(variable, tmp_path):
    done = python("import torch", tmp_path, flag="1", **{variable: "24"})
    assert done.returncode == 2
    assert f"{variable}='24' is not one of" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def memory(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(backbone, "memory_of", lambda device: counted)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    return counted


def test_by_hand(memory, monkeypatch):
    monkeypatch.setenv("SLOTH_MEMORY", "auto")
    model = lora_model()
    for said in ("lots", 24):
        with pytest.raises(sloth_plugins.SlothError, match=r"memory=.* is not one of: auto, min"):
            sloth_plugins.patch(model, "*:blocks,*:checkpointing", memory=said)
    sloth_plugins.patch(model, "*:blocks,*:checkpointing", memory="min")
    for _ in range(3):
        gradients(model)
    (stack,) = backbone.stacks_of(model)
    assert [option.policy for option in stack.current.options] == [Policy.INPUT] * 2
    sloth_plugins.patch(model, "*:blocks,*:checkpointing", memory="90%")
    gradients(model)
    assert [option.policy for option in stack.current.options] == [Policy.KEEP] * 2


def test_what_is_told(memory, said):
    model = lora_model()
    sloth_plugins.patch(model, "*:blocks,*:checkpointing")
    for _ in range(3):
        gradients(model)
    assert not said, "nothing is computed again"
    sloth_plugins.patch(model, "*:blocks,*:checkpointing", memory="min")
    gradients(model)
    (stack,) = backbone.stacks_of(model)
    text = backbone.told(stack)
    assert "26 tokens, layers 0-1 recomputed; 100% of computing all again" in text
    assert text.endswith("expected as little as goes")


def test_what_is_superseded(memory, said):
    model = lora_model(changes={"num_hidden_layers": 4})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(model.base_model.model.model.layers):
        layer.gradient_checkpointing = i % 2 == 0
    sloth_plugins.patch(model, "*:blocks,*:checkpointing")
    for _ in range(3):
        gradients(model)
    assert any("every_n_layers is superseded by the plan" in line for line in said)


def test_somebody_elses_offloading_is_left_alone(memory, said):
    model = lora_model()
    sloth_plugins.patch(model, "*:blocks,*:checkpointing")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        gradients(model, batch())
    assert not backbone.stacks_of(model) or backbone.stacks_of(model)[0].current is None
    assert any("activation_offloading" in line for line in said)
