"""Where a trainer is made: patches that translate the call of its constructor, before there is a model to patch.

Upstream's own class gets a constructor around its own while patches are active; a class that derives from it comes
here when it calls `super().__init__`. What came of a patch here is kept for the report on the trainer.
"""

import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from sloth_plugins.registry import Outcome, Patch, PlanItem, Skip, TrainerSpec

from . import seams
from .discovery import Plugins
from .environment import probe
from .errors import SlothError
from .planning import make_plan
from .resolving import Translate, bind_constructor
from .selection import Selection

Say = Callable[[str], None]
Selected = Callable[[], Selection | None]
"""What is selected at the time of a call; None while nothing is active."""

# What came of patches where an object was made, by its identity, since a trainer may define equality.
_made: dict[int, tuple["weakref.ref[Any]", list[Outcome]]] = {}


def open_constructors(module: ModuleType, known: Plugins, selected: Selected, say: Say) -> None:
    """Have calls of the constructors of a module's trainers translated where that is selected."""
    for spec, patch, kind in _patches_of(module, known):
        translate = bind_constructor(patch, kind)
        if isinstance(translate, Skip):
            say(f"{spec.family}:{patch.name} is left out for {kind.__name__}: {translate}")
        else:
            seams.open_constructor(kind, _translator(spec, patch, kind, translate, known, selected, say))


def _patches_of(module: ModuleType, known: Plugins) -> Iterator[tuple[TrainerSpec, Patch, type]]:
    """The patches of constructors of the classes that a module defines, each with its class."""
    for spec in known.trainers.values():
        for patch in spec.patches:
            for path in (patch.target, *patch.formerly) if patch.constructor else ():
                home, _, name = path.partition(":")
                kind: Any = getattr(module, name, None)
                if home == module.__name__ == getattr(kind, "__module__", None):
                    yield spec, patch, kind


def _translator(
    spec: TrainerSpec, patch: Patch, kind: type, translate: Translate, known: Plugins, selected: Selected, say: Say
) -> seams.Translator:
    name = f"{spec.family}:{patch.name}"

    def translated(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> seams.Arguments:
        try:
            return choose(trainer, args, kwargs)
        except SlothError as error:
            say(str(error))
            raise SystemExit(2) from None
        except Exception as error:  # noqa: BLE001 - upstream says what is wrong with the call as it is; it is printed
            say(f"{name} leaves the call of {kind.__name__} as it is, since {type(error).__name__}: {error}")
            return args, kwargs

    def choose(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> seams.Arguments:
        selection = selected()
        if selection is None:
            return args, kwargs
        new_args, new_kwargs, changed = translate(args, kwargs)
        item = _item(spec, patch, kwargs.get("args"), selection, known) if changed else None
        if item is None or not item.selected:
            return args, kwargs
        if item.skip is not None:
            if item.named:
                raise SlothError(f"{name} was asked for by name and cannot run: {item.skip}")
            say(f"{name} leaves the call of {kind.__name__} as it is: {item.skip}")
            return args, kwargs
        say(f"{kind.__name__} was called as in older versions; {name} has translated: {changed}")
        outcome = Outcome(
            architecture=spec.name, family=spec.family, patch=patch.name, state="applied", modules=1,
            reason=changed, trainer=type(trainer).__name__,
        )  # fmt: skip
        remember(trainer, [outcome])
        return new_args, new_kwargs

    return translated


def _item(spec: TrainerSpec, patch: Patch, args: Any, selection: Selection, known: Plugins) -> PlanItem | None:
    """What is planned for one patch; None where a plugin has taken it out of the plan."""
    items = make_plan(spec, [patch], [args], selection, probe(), known).items
    return next((item for item in items if item.patch.name == patch.name), None)


def remember(made: Any, outcomes: list[Outcome]) -> None:
    """Note what came of patches where an object was made; it is forgotten when the object is collected."""
    key = id(made)
    _made[key] = weakref.ref(made, lambda gone: _made.pop(key, None)), outcomes


def known(made: Any) -> list[Outcome]:
    """What came of patches where this object was made."""
    reference, outcomes = _made.get(id(made), (None, []))
    return outcomes if reference is not None and reference() is made else []


def outcomes_of(trainer: Any) -> list[Outcome]:
    """What has come of patches where a trainer was made, and the parts that it holds, if anything."""
    holds = [value for value in vars(trainer).values() if id(value) in _made] if hasattr(trainer, "__dict__") else []
    return [outcome for made in (trainer, *holds) for outcome in known(made)]
