"""Patches of the toy trainers, right and wrong ones, and models for those to train."""

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sloth_plugins.registry import Patch

TOY = "toy_trainers:ToyTrainer"
CALLS = []


def outer(trainer):
    """Wraps a method, as all that only opens a scope does."""
    original = trainer.shape

    @functools.wraps(original)
    def shape(self, *args, **kwargs):
        CALLS.append("outer")
        return original(self, *args, **kwargs)

    return {"shape": shape}


def inner(trainer):
    """Wraps the same method and replaces a static one."""
    original = trainer.shape

    @functools.wraps(original)
    def shape(self, *args, **kwargs):
        CALLS.append("inner")
        return original(self, *args, **kwargs)

    def unit(loss):
        CALLS.append("unit")
        return loss

    return {"shape": shape, "unit": staticmethod(unit)}


def nothing(trainer):
    return {}


def failing(trainer):
    raise KeyError("oops")


def unknown(trainer):
    return {"reshape": lambda self: None}


def not_static(trainer):
    return {"unit": lambda self, loss: loss}


def no_function(trainer):
    return {"shape": 3}


def narrower(trainer):
    return {"shape": lambda self, loss: loss}


def patch(name="first", replacement="inner", **changes):
    given = {"target": TOY, "replacement": f"{__name__}:{replacement}"}
    return Patch(name=name, **{**given, **changes})


def model(kind="llama"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    sizes |= {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else {"intermediate_size": 48}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


def toy_outcomes(report):
    """What came of the toys' patches: every trainer is also one that we have patches for."""
    return [outcome for outcome in report.outcomes if outcome.trainer and outcome.family != "trainer"]


def of_trainers(report):
    return [(outcome.patch, outcome.state, outcome.modules) for outcome in toy_outcomes(report)]
