"""`patch(model)` and `revert(model)`: from a model and a selection to a report."""

import os
import weakref
from dataclasses import replace
from typing import Any

import torch

from sloth_plugins.registry import Environment, Outcome, PlanItem, Report, Skip

from . import application, construction, parts, trainers
from .compatibility import verdict
from .discovery import Plugins, plugins
from .environment import probe
from .errors import SlothError
from .memory import allow, check_environment
from .planning import make_plan
from .resolving import Binding, bind, bind_trainer
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


def _resolve(item: PlanItem, trainer: Any, known: Plugins) -> Binding | Skip:
    if item.architecture not in known.trainers:
        return bind(item.patch)
    kind = trainers.target_class(item.patch, trainer)
    return (
        Skip(f"{type(trainer).__name__} is no {item.patch.target}") if kind is None else bind_trainer(item.patch, kind)
    )


def bind_item(item: PlanItem, trainer: Any, known: Plugins) -> tuple[PlanItem, Binding | None]:
    """The binding of an item that is to be applied; else None, and the item with the reason."""
    if not item.selected or item.skip is not None:
        return item, None
    bound = _resolve(item, trainer, known)
    if isinstance(bound, Skip):
        return replace(item, skip=bound), None
    if bound.drift is not None and not item.named:
        asked = f"{item.family}:{item.patch.name}"
        return replace(item, skip=Skip(f"{bound.drift}; {VARIABLE}=1,{asked} applies it all the same")), None
    return item, bound


def _refusal_text(result: application.Survey) -> str:
    reason, _ = result.refusals.most_common(1)[0]
    if not result.refused_example:
        return reason
    others = f", and {len(result.refusals) - 1} other reasons" if len(result.refusals) > 1 else ""
    return f"{result.refusals.total()} left alone ({result.refused_example}: {reason}{others})"


def outcome_of(item: PlanItem, result: application.Survey | None, trainer: str) -> Outcome:
    """What came of an item, whose survey is None where it was not bound."""
    base = Outcome(
        architecture=item.architecture, family=item.family, patch=item.patch.name, state="skipped", trainer=trainer
    )
    if not item.selected:
        return replace(base, state="off", reason="not selected")
    if item.skip is not None:
        return replace(base, reason=str(item.skip))
    assert result is not None, "a selected item without a skip has been bound"
    refused = _refusal_text(result) if result.refusals else ""
    if result.modules:
        drift = result.binding.drift
        advice = "" if trainer else "; compare it by `sloth-plugins verify --model MODEL`"
        warning = f"untested: {drift}{advice}" if drift else ""
        reason = "; ".join(filter(None, (warning, refused)))
        return replace(base, state="applied", modules=len(result.modules), reason=reason)
    return replace(base, reason=refused or f"the model has no {result.binding.kind.__qualname__}")


def _tested(item: PlanItem, territory: Territory, environment: Environment) -> str:
    """The compat matrix's verdict for this patch of this model on the installed transformers."""
    configs = territory.configs.get(item.architecture, ())
    row = configs[0].model_type if configs else item.architecture
    return verdict(row, item.patch.name, environment.versions.get("transformers", "none"))


def refuse_if_named(items: list[PlanItem], outcomes: list[Outcome], selection: Selection) -> None:
    """Raise `SlothError` for a patch that the user has named and that is not applied."""
    for item, outcome in zip(items, outcomes, strict=True):
        if item.named and outcome.state == "skipped":
            raise SlothError(
                f"{item.family}:{item.patch.name} was asked for by name and cannot run: {outcome.reason}; "
                f"take it out of {selection.source} to train without it"
            )


def _plan(
    territory: Territory, trainer: Any, selection: Selection, environment: Environment, known: Plugins
) -> list[PlanItem]:
    """What is meant to happen to a model's architectures, then to its trainer."""
    items: list[PlanItem] = []
    for name, configs in territory.configs.items():
        patches = known.patches(name)
        items += make_plan(known.architectures[name], patches, configs, selection, environment, known).items
    for spec in known.trainers.values() if trainer is not None else ():
        args = getattr(trainer, "args", None)
        meant = [patch for patch in spec.patches if trainers.is_meant(patch, trainer, args)]
        if meant:
            items += make_plan(spec, meant, [args], selection, environment, known).items
    return items


def examine(
    model: torch.nn.Module,
    selection: Selection | None = None,
    *,
    trainer: Any = None,
    dry: bool = False,
    known: Plugins | None = None,
) -> Report:
    """Plan and, unless `dry`, apply, to a model and the trainer that trains it.

    Raises `SlothError` where a patch that was named cannot run.
    """
    selection = default_selection() if selection is None else selection
    known = plugins() if known is None else known
    check_names(selection, known.catalogue())
    environment = probe()
    territory = survey_territory(model, known)
    bound = [bind_item(item, trainer, known) for item in _plan(territory, trainer, selection, environment, known)]
    items = [item for item, _ in bound]

    def check(binding: Binding, module: Any) -> str | None:
        skip = known.check(binding.patch, module, environment)
        return None if skip is None else str(skip)

    architectures = {id(binding): item.architecture for item, binding in bound}

    def covers(binding: Binding, module: str) -> bool:
        return territory.owners.get(module) == architectures[id(binding)]

    of_trainer = [binding for item, binding in bound if binding is not None and item.architecture in known.trainers]
    of_model = [binding for item, binding in bound if binding is not None and item.architecture not in known.trainers]
    surveys, by_name = application.survey(model, of_model, covers, check)
    wanted = list(by_name.values())
    if trainer is not None:
        found, for_trainer = trainers.survey_trainer(trainer, of_trainer, check)
        surveys += found
        wanted += [(trainer, for_trainer)] if for_trainer or application.patched(trainer) else []
    by_binding = {id(result.binding): result for result in surveys}
    outcomes = []
    for item, binding in bound:
        kind = trainers.stock_class(trainer).__name__ if item.architecture in known.trainers else ""
        outcome = outcome_of(item, by_binding.get(id(binding)), kind)
        outcomes.append(replace(outcome, tested=_tested(item, territory, environment)))
    refuse_if_named(items, outcomes, selection)
    # What runs only when it is named is no news where nobody has.
    told = [outcome for item, outcome in zip(items, outcomes, strict=True) if item.selected or item.patch.default]
    told += construction.outcomes_of(trainer)
    changed = 0 if dry else application.apply(wanted)
    if trainer is not None and not dry:
        trainers.remember(trainer)
    report = Report(
        environment=environment,
        selection=selection.text,
        outcomes=tuple(told),
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


def patch(
    model: torch.nn.Module, selection: str | None = None, *, trainer: Any = None, memory: str | None = None
) -> Report:
    """Bring a model, and the trainer that is given with it, to exactly the selected patches, in place.

    `selection` has the form of SLOTH_PLUGINS and defaults to it, or to everything that is on by default. Calling it
    again with another selection adds and removes; `"off"` takes all away. `memory` has the form of SLOTH_MEMORY, and
    counts for this model instead of it. What is chosen so stays, whatever
    SLOTH_PLUGINS says, when the model enters training; trainers of the model that are not given run stock. Raises
    `SlothError` for a selection that names something unknown, a patch that cannot run here, or a trainer of another
    model.
    """
    global _called_by_hand
    _must_be_a_module(model, "patch")
    if trainer is not None and not trainers.trains(trainer, model):
        raise SlothError(
            f"patch(trainer=) takes the trainer of this model, not {type(trainer).__name__} {trainer!r:.60}"
        )
    parsed = None if selection is None else parse(selection, "selection")
    check_environment()
    if memory is not None:
        allow(model, memory)
    _called_by_hand = True
    report = examine(model, parsed, trainer=trainer)
    others = [other for other in trainers.trainers_of(model) if other is not trainer]
    application.apply([(other, []) for other in others if application.patched(other)])
    parts.reselect(model, default_selection() if parsed is None else parsed, plugins())
    for module in model.modules():
        _reverted.discard(module)
    _patched_by_hand.add(model)
    return report


def revert(model: torch.nn.Module) -> int:
    """Give every module of a model, and its trainers, their own class back; returns how many modules were patched.

    The model stays stock in this process until `patch` is called on it: a Trainer that it enters leaves it alone, with
    all that is around it.
    """
    _must_be_a_module(model, "revert")
    count = application.revert(model, trainers.trainers_of(model))
    parts.reselect(model, parse("off"), plugins())
    for module in model.modules():
        _patched_by_hand.discard(module)
    _reverted.add(model)
    return count
