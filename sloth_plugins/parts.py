"""Parts of trainers: what a trainer makes for itself in its constructor, and patches replace methods of.

A rollout engine starts where it is made, which is long before the trainer trains. So such an object gets its generated
class (`application.py`) before its constructor runs, and `revert` of the model takes it back as it does the trainer's.
"""

import inspect
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from sloth_plugins.registry import Patch, TrainerSpec

from . import construction, seams
from .construction import Say, Selected
from .discovery import Plugins
from .environment import probe
from .errors import SlothError
from .planning import make_plan
from .selection import Selection, decide

if TYPE_CHECKING:
    import torch

# By identity, as trainers are.
_parts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def open_parts(module: ModuleType, known: Plugins, selected: Selected, say: Say) -> None:
    """Have what a module's classes make patched from its constructor on, where that is selected."""
    for kind in {kind for _, _, kind in _patches_of(module, known)}:
        seams.open_constructor(kind, _entrance(module, kind, known, selected, say))


def _patches_of(module: ModuleType, known: Plugins) -> Iterator[tuple[TrainerSpec, Patch, type]]:
    for spec in known.trainers.values():
        for patch in spec.patches:
            home, _, name = patch.target.partition(":")
            kind: Any = getattr(module, name, None)
            if not patch.constructor and home == module.__name__ == getattr(kind, "__module__", None):
                yield spec, patch, kind


def _entrance(module: ModuleType, kind: type, known: Plugins, selected: Selected, say: Say) -> seams.Translator:
    def entered(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> seams.Arguments:
        selection = selected()
        try:
            if selection is not None:
                _enter(part, _arguments(kind, part, args, kwargs), selection, module, known)
        except SlothError as error:
            say(str(error))
            raise SystemExit(2) from None
        except Exception as error:  # noqa: BLE001 - our defect must not end somebody's training; it is printed
            say(f"{kind.__name__} stays stock, since patching it failed: {type(error).__name__}: {error}")
        return args, kwargs

    return entered


def _arguments(kind: type, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """What the constructor is called with, by name."""
    # Not of the seam, which takes anything.
    constructor = inspect.unwrap(kind.__init__)  # type: ignore[misc]  # of this very class
    bound = inspect.signature(constructor).bind(part, *args, **kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _enter(part: Any, arguments: SimpleNamespace, selection: Selection, module: ModuleType, known: Plugins) -> None:
    """Give a part its methods, or say in the report on its trainer why not."""
    from . import application, patching, trainers

    environment = probe()
    specs: dict[str, list[Patch]] = {}
    for spec, patch, kind in _patches_of(module, known):
        if isinstance(part, kind):
            specs.setdefault(spec.name, []).append(patch)
    items = [
        item
        for name, patches in specs.items()
        for item in make_plan(known.trainers[name], patches, [arguments], selection, environment, known).items
    ]
    bound = [patching.bind_item(item, part, known) for item in items]

    def check(binding: Any, found: Any) -> str | None:
        skip = known.check(binding.patch, found, environment)
        return str(skip) if skip is not None else binding.refuses and binding.refuses(arguments)

    surveys, wanted = trainers.survey_trainer(part, [binding for _, binding in bound if binding is not None], check)
    by_binding = {id(survey.binding): survey for survey in surveys}
    name = trainers.stock_class(part).__name__
    outcomes = [patching.outcome_of(item, by_binding.get(id(binding)), name) for item, binding in bound]
    patching.refuse_if_named([item for item, _ in bound], outcomes, selection)
    if wanted:
        application.apply([(part, wanted)])
        _parts[id(part)] = part
    told = [outcome for (item, _), outcome in zip(bound, outcomes, strict=True) if item.selected or item.patch.default]
    construction.remember(part, told)


def parts_of(model: "torch.nn.Module") -> list[Any]:
    """The patched parts of trainers of a model."""
    from .trainers import trains

    return [part for part in list(_parts.values()) if trains(part, model)]


def reselect(model: "torch.nn.Module", selection: Selection, known: Plugins) -> None:
    """Take from the parts of a model what a selection does not select; what is not there yet would come too late."""
    from . import application

    for part in parts_of(model):
        state = application.patched(part)
        assert state is not None, "what is kept here is patched until it is reverted"
        kept = [binding for binding in state.bindings if _is_selected(binding.patch, selection, known)]
        application.apply([(part, kept)])
        names = [binding.patch.name for binding in kept]
        told = [item for item in construction.known(part) if item.state != "applied" or item.patch in names]
        construction.remember(part, told)
        if not kept:
            del _parts[id(part)]


def _is_selected(patch: Patch, selection: Selection, known: Plugins) -> bool:
    return any(
        decide(selection, spec.name, patch.name, family=spec.family, default=patch.default).selected
        for spec in known.trainers.values()
        if patch in spec.patches
    )
