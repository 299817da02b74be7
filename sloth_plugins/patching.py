"""`patch(model)` and `revert(model)`: from a model and a selection to a report."""

import os
import weakref
from dataclasses import replace

import torch

from sloth_plugins.registry import Environment, Outcome, PlanItem, Report, Skip

from . import application
from .compatibility import verdict
from .discovery import Plugins, plugins
from .environment import probe
from .errors import SlothError
from .planning import make_plan
from .resolving import Binding, bind
from .selection import VARIABLE, Selection, check_names, parse
from .territory import Territory, survey_territory

# What the user did by hand in this process. The seams leave these models as they are, and the line at exit that nothing
# was patched is not said once `patch` was called.
_patched_by_hand: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_reverted: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_called_by_hand = False


def default_selection() -> Selection:
    """What SLOTH_PLUGINS says; everything that is on by default where it is not set."""
    return parse(os.environ.get(VARIABLE, "1"))


def was_called_by_hand() -> bool:
    """Whether the user has called `patch` in this process."""
    return _called_by_hand


def was_reverted(model: torch.nn.Module) -> bool:
    """Whether the user has reverted a model, or a part of it, and not patched it since."""
    return bool(_reverted) and any(module in _reverted for module in model.modules())


def was_patched_by_hand(model: torch.nn.Module) -> bool:
    """Whether the user has called `patch` on a model, or a part of it, and so has chosen what it runs."""
    return bool(_patched_by_hand) and any(module in _patched_by_hand for module in model.modules())


def _bind(item: PlanItem) -> tuple[PlanItem, Binding | None]:
    if not item.selected or item.skip is not None:
        return item, None
    bound = bind(item.patch)
    if isinstance(bound, Skip):
        return replace(item, skip=bound), None
    if bound.drift is not None and not item.named:
        asked = f"{item.family}:{item.patch.name}"
        return replace(item, skip=Skip(f"{bound.drift}; {VARIABLE}=1,{asked} applies it all the same")), None
    return item, bound


def _refusal_text(result: application.Survey) -> str:
    reason, _ = result.refusals.most_common(1)[0]
    others = f", and {len(result.refusals) - 1} other reasons" if len(result.refusals) > 1 else ""
    return f"{result.refusals.total()} left alone ({result.refused_example}: {reason}{others})"


def _outcome(item: PlanItem, result: application.Survey | None) -> Outcome:
    base = Outcome(architecture=item.architecture, family=item.family, patch=item.patch.name, state="skipped")
    if not item.selected:
        return replace(base, state="off", reason="not selected")
    if item.skip is not None:
        return replace(base, reason=str(item.skip))
    assert result is not None, "a selected item without a skip has been bound"
    refused = _refusal_text(result) if result.refusals else ""
    if result.modules:
        drift = result.binding.drift
        warning = f"untested: {drift}; compare it by `sloth-plugins verify --model MODEL`" if drift else ""
        reason = "; ".join(filter(None, (warning, refused)))
        return replace(base, state="applied", modules=len(result.modules), reason=reason)
    return replace(base, reason=refused or f"the model has no {result.binding.kind.__qualname__}")


def _tested(item: PlanItem, territory: Territory, environment: Environment) -> str:
    """The compat matrix's verdict for this patch of this model on the installed transformers."""
    configs = territory.configs.get(item.architecture, ())
    model_type = configs[0].model_type if configs else ""
    return verdict(model_type, item.patch.name, environment.versions.get("transformers", "none"))


def _refuse_if_named(items: list[PlanItem], outcomes: list[Outcome], selection: Selection) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        if item.named and outcome.state == "skipped":
            raise SlothError(
                f"{item.family}:{item.patch.name} was asked for by name and cannot run: {outcome.reason}; "
                f"take it out of {selection.source} to train without it"
            )


def examine(
    model: torch.nn.Module, selection: Selection | None = None, *, dry: bool = False, known: Plugins | None = None
) -> Report:
    """Plan and, unless `dry`, apply. Raises `SlothError` where a patch that was named cannot run."""
    selection = default_selection() if selection is None else selection
    known = plugins() if known is None else known
    check_names(selection, known.catalogue())
    environment = probe()
    territory = survey_territory(model, known)
    items: list[PlanItem] = []
    for name, configs in territory.configs.items():
        items += make_plan(known.architectures[name], configs, selection, environment, known).items
    bound = [_bind(item) for item in items]
    items = [item for item, _ in bound]

    def check(binding: Binding, module: torch.nn.Module) -> str | None:
        skip = known.check(binding.patch, module, environment)
        return None if skip is None else str(skip)

    architectures = {id(binding): item.architecture for item, binding in bound}

    def covers(binding: Binding, module: str) -> bool:
        return territory.owners.get(module) == architectures[id(binding)]

    bindings = [binding for _, binding in bound if binding is not None]
    surveys, wanted = application.survey(model, bindings, covers, check)
    by_binding = {id(result.binding): result for result in surveys}
    outcomes = [
        replace(_outcome(item, by_binding.get(id(binding))), tested=_tested(item, territory, environment))
        for item, binding in bound
    ]
    _refuse_if_named(items, outcomes, selection)
    changed = 0 if dry else application.apply(wanted.values())
    report = Report(
        environment=environment,
        selection=selection.text,
        outcomes=tuple(outcomes),
        unknown=territory.unknown,
        towers=territory.towers,
        changed=changed,
        dry=dry,
    )
    if not dry:
        known.report(report)
    return report


def _must_be_a_module(model: object, function: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise SlothError(f"{function}() takes a torch.nn.Module, not {type(model).__name__} {model!r:.60}")


def patch(model: torch.nn.Module, selection: str | None = None) -> Report:
    """Bring a model to exactly the selected patches, in place.

    `selection` has the form of SLOTH_PLUGINS and defaults to it, or to everything that is on by default. Calling it
    again with another selection adds and removes; `"off"` takes all away. What is chosen so stays, whatever
    SLOTH_PLUGINS says, when the model enters training. Raises `SlothError` for a selection that
    names something unknown, or a patch that cannot run here.
    """
    global _called_by_hand
    _must_be_a_module(model, "patch")
    parsed = None if selection is None else parse(selection, "selection")
    _called_by_hand = True
    report = examine(model, parsed)
    for module in model.modules():
        _reverted.discard(module)
    _patched_by_hand.add(model)
    return report


def revert(model: torch.nn.Module) -> int:
    """Give every module of a model its own class back; returns how many had been patched.

    The model stays stock in this process until `patch` is called on it: a Trainer that it enters leaves it alone, with
    all that is around it.
    """
    _must_be_a_module(model, "revert")
    count = application.revert(model)
    for module in model.modules():
        _patched_by_hand.discard(module)
    _reverted.add(model)
    return count
