"""Selection x architecture x environment x config -> Plan: what is meant to happen, and why not the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sloth_plugins.registry import (
    ArchitectureSpec,
    Environment,
    Patch,
    Plan,
    PlanItem,
    Skip,
    TrainerSpec,
    Unsupported,
    first_unmet,
)

from .discovery import Plugins
from .selection import Selection, decide

MINIMUM = ("torch>=2.8", "transformers>=4.57.6")


def _config_value(config: Any, path: str) -> Any:
    value = config
    for attribute in path.split("."):
        value = value.get(attribute) if isinstance(value, Mapping) else getattr(value, attribute, None)
    return value


def unmet_condition(
    patch: Patch, spec: ArchitectureSpec | TrainerSpec, config: Any, environment: Environment
) -> Skip | None:
    """The first thing that keeps a patch from applying to a config in this environment, before any import."""
    if isinstance(patch.status, Unsupported):
        return Skip(f"unsupported: {patch.status.reason}")
    unmet = first_unmet((*MINIMUM, *spec.requires, *patch.requires), environment.versions.get)
    if unmet is not None:
        return Skip("version", unmet.required, unmet.found)
    for path, allowed in patch.where.items():
        found = _config_value(config, path)
        if found not in allowed:
            return Skip(f"config.{path}", " or ".join(map(str, allowed)), str(found))
    return None


def make_plan(
    spec: ArchitectureSpec | TrainerSpec,
    patches: Sequence[Patch],
    configs: Sequence[Any],
    selection: Selection,
    environment: Environment,
    plugins: Plugins,
) -> Plan:
    """The plan for these patches of one architecture of a model, or of its trainer, after every plugin has adjusted it.

    A model may hold several models of one architecture, with configs of their own: a patch must fit all of them. The
    config of a trainer is its `args`.
    """
    items = []
    for patch in patches:
        decision = decide(selection, spec.name, patch.name, family=spec.family, default=patch.default)
        item = PlanItem(
            architecture=spec.name,
            family=spec.family,
            patch=patch,
            selected=decision.selected,
            named=decision.named,
        )
        if decision.selected:
            unmet = (unmet_condition(patch, spec, config, environment) for config in configs)
            item = replace(item, skip=next((skip for skip in unmet if skip is not None), None))
        items.append(item)
    plan = Plan(items)
    plugins.adjust_plan(plan, environment)
    return plan
