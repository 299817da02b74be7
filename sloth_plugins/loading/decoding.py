"""The `generate` of a model on its fused layers, whether or not it is patched already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..selection import decide

ENTRY = "sloth_plugins.patches.generation.entry"
# Deselecting this patch of GRPO's deselects the decoder here, too.
DECODING = ("trl_grpo", "rollout_decoding")
# Where it is known to be faster.
DEVICES = ("cpu", "cuda")


@contextmanager
def fast(model: Any) -> Iterator[Callable[..., Any]]:
    """Within it, the given function takes what `model.generate` takes and returns what it returns, sooner.

    A model that has no patches has those that are selected meanwhile, and one that the user has reverted, or for which
    SLOTH_PLUGINS is off, generates as transformers does.
    """
    from .. import activation, application, patching

    selection = activation.selected() or patching.default_selection()
    if model.device.type not in DEVICES or not decide(selection, *DECODING, family="trl").selected:
        yield model.generate
        return
    if any(application.patched_modules(model)):
        yield import_module(ENTRY).faster(model, model.generate)
        return
    if selection.is_off or patching.was_reverted(model):
        yield model.generate
        return
    patching.examine(model, selection)
    try:
        yield import_module(ENTRY).faster(model, model.generate)
    finally:
        application.revert(model)
