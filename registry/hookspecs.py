"""The hooks of the pluggy project `sloth`. Plugins are found through the entry-point group `sloth_plugins`."""

from collections.abc import Iterable
from typing import Any

import pluggy

from .model import ArchitectureSpec, Patch, TrainerSpec
from .results import Environment, Plan, Report, Skip

PROJECT = "sloth"
ENTRY_POINT_GROUP = "sloth_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sloth_architectures() -> Iterable[ArchitectureSpec]:  # type: ignore[empty-body]  # a hookspec has no body
    """Declare architectures.

    Called once, when the plugins are loaded; it must not import torch or transformers. All results are used. A name
    or a model type that another plugin has already declared is reported with both plugins' names, and the earlier
    declaration stands.
    """


@hookspec
def sloth_trainers() -> Iterable[TrainerSpec]:  # type: ignore[empty-body]  # a hookspec has no body
    """Declare patches of trainers.

    Called once, when the plugins are loaded; it must not import torch, transformers or trl. All results are used. A
    name that another plugin has already declared, of an architecture or of a trainer, is reported with both plugins'
    names, and the earlier declaration stands.
    """


@hookspec
def sloth_patches(architecture: ArchitectureSpec) -> Iterable[Patch]:  # type: ignore[empty-body]  # a hookspec has no body
    """Add patches to an architecture, somebody else's too.

    Called once for each architecture, when the plugins are loaded. All results are used, after the architecture's own.
    """


@hookspec(firstresult=True)
def sloth_architecture_of(config: Any) -> str | None:
    """Name the architecture that covers a model's config, or None to leave it to the others.

    Called for each config that a model holds when it enters training. The first result is used; the built-in plugin
    answers last and looks `config.model_type` up.
    """


@hookspec
def sloth_adjust_plan(plan: Plan, environment: Environment) -> None:
    """Reorder, drop or replace the items of `plan.items`, in place.

    Called for each architecture of a model that enters training, and for each trainer spec that is for its trainer,
    after the selection and all requirements were looked at and before anything is applied.
    """


@hookspec(firstresult=True)
def sloth_check(patch: Patch, module: Any, environment: Environment) -> Skip | None:
    """Refuse one patch for one module (for a function: for one caller), or None to leave it to the others.

    Called for each module that a patch would change, and with the trainer for a patch of one; it must not change
    either. The first result is used; the built-in checks run last.
    """


@hookspec
def sloth_report(report: Report) -> None:
    """Learn what was applied. Called after each model that entered training; results are ignored."""
