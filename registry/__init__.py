"""The contract: all that the author of an extension imports.

A plugin is a module with `@hookimpl` functions and an entry point in the group `sloth_plugins`::

    from sloth_plugins.registry import ArchitectureSpec, Patch, hookimpl

    @hookimpl
    def sloth_architectures():
        yield ArchitectureSpec(name=..., model_types=(...,), patches=(Patch(name=..., target=..., replacement=...),))
"""

from .hookspecs import ENTRY_POINT_GROUP, PROJECT, hookimpl, hookspec
from .model import (
    ArchitectureSpec,
    BlockLayout,
    Experimental,
    GgufFormat,
    Patch,
    SpecError,
    Status,
    Supported,
    TrainerSpec,
    Unsupported,
)
from .requirements import Unmet, first_unmet
from .results import Environment, Outcome, Plan, PlanItem, Report, Skip

__all__ = [
    "ENTRY_POINT_GROUP",
    "PROJECT",
    "ArchitectureSpec",
    "BlockLayout",
    "Environment",
    "Experimental",
    "GgufFormat",
    "Outcome",
    "Patch",
    "Plan",
    "PlanItem",
    "Report",
    "Skip",
    "SpecError",
    "Status",
    "Supported",
    "TrainerSpec",
    "Unmet",
    "Unsupported",
    "first_unmet",
    "hookimpl",
    "hookspec",
]
