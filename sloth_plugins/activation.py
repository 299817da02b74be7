"""The flag's life in one process: read it, wait for the seams, patch what passes, and say so if nothing did."""

import atexit
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import parent_process
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import seams, segments
from .errors import SlothError
from .memory import check_environment
from .processes import rank
from .selection import VARIABLE, Selection, check_names, decide, parse
from .watching import Watcher

if TYPE_CHECKING:
    from .discovery import Plugins

# The trainers' patch that counts bytes.
PLANS = "memory_plans"
# Run with `python -m`, these start training processes or serve a test run; installed commands are told by their folder.
LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed.", "trl.", "transformers.", "pytest")


@dataclass(slots=True)
class Activation:
    """What is active: the selection, whether a model has come or need not, and which lines were printed."""

    selection: Selection
    watcher: Watcher = field(default_factory=Watcher)
    reached: bool = False
    expects_training: bool = True
    printed: set[str] = field(default_factory=set)


_active: Activation | None = None


def _say(text: str) -> None:
    """Print to stderr, on the main process, once for each text."""
    assert _active is not None, "only an activation speaks"
    if text not in _active.printed and rank() == 0:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - must be seen whatever logging the script sets up
    _active.printed.add(text)


def _check_names_now(selection: Selection) -> None:
    """Catch a misspelt name at import, before a model is loaded.

    While a plugin cannot be loaded its names are unknown; the check is then left to the seam, where the import cycle
    that may have caused it is over.
    """
    known = _known_now()
    if not known.problems:
        check_names(selection, known.catalogue())


def _known_now() -> "Plugins":
    """The plugins that can be loaded now; they are loaded anew later if one cannot be."""
    from .discovery import plugins

    known = plugins()
    if known.problems:
        plugins.cache_clear()
    return known


def activate(selection: str | None = None) -> None:
    """Patch every model that enters training in this process from now on.

    `selection` has the form of SLOTH_PLUGINS and defaults to it. Safe to call twice; the last call's selection holds.
    Raises `SlothError` for a selection that cannot be read or names something unknown.
    """
    global _active
    parsed = parse(os.environ.get(VARIABLE)) if selection is None else parse(selection, "selection")
    if parsed.is_off:
        deactivate()
        return
    check_environment()
    if parsed.names_something:
        _check_names_now(parsed)
    plans = decide(parsed, "trainer", PLANS, family="trainer").selected
    (segments.grow if plans else segments.stay)()
    if _active is not None:
        _active.selection = parsed
        return
    _active = Activation(parsed)
    _active.watcher.when_imported("vllm", lambda module: segments.stay())
    atexit.register(_say_if_nothing_came)
    for module in seams.SEAMS:
        _active.watcher.when_imported(module, _module_came)
    for module in seams.TRAINERS:
        _active.watcher.when_imported(module, _trainers_came)
    for module in seams.PARTS:
        _active.watcher.when_imported(module, _parts_came)


def activate_unless_chosen(also: str = "") -> None:
    """Activate for a model that is loaded here: as SLOTH_PLUGINS says, or the defaults where it is not set.

    What is active already stays so, and what was switched off stays off. `also` are further terms of a selection; one
    of the user's that takes something away comes after them, and wins.
    """
    chosen = os.environ.get(VARIABLE, "1") if _active is None else _active.selection.text
    if parse(chosen).is_off:
        return
    by_us = _active is None and VARIABLE not in os.environ
    new = [term for term in also.split(",") if term and term not in chosen.split(",")]
    # Before a selection that begins with an exclusion stand all defaults.
    defaults = ["1"] if new and chosen.startswith("-") else []
    activate(",".join([*new, *defaults, chosen]))
    if by_us and _active is not None:
        _active.expects_training = False


def deactivate() -> None:
    """Take the seams away again; models that are patched stay so."""
    global _active
    if _active is not None:
        _active.watcher.stop()
        segments.stay()
        seams.close_seams()
        atexit.unregister(_say_if_nothing_came)
        _active = None


def _module_came(module: ModuleType) -> None:
    """Open the seams of a module; a failure of ours must not break somebody's import."""
    try:
        missing = seams.open_seams(module, enter)
    except Exception as error:  # noqa: BLE001 - whatever upstream has become, its import goes on; it is printed
        missing = [f"{module.__name__} ({type(error).__name__}: {error})"]
    for name in missing:
        _say(f"sloth-plugins: {name} is not what it was, so no model is patched there; call sloth_plugins.patch(model)")


def _trainers_came(module: ModuleType) -> None:
    """Translate calls of the constructors of a module's trainers, in what way the patches of them do."""
    try:
        from .construction import open_constructors

        open_constructors(module, _known_now(), selected, lambda line: _say(f"sloth-plugins: {line}"))
    except Exception as error:  # noqa: BLE001 - as above
        _say(f"sloth-plugins: {module.__name__} is left as it is ({type(error).__name__}: {error})")


def _parts_came(module: ModuleType) -> None:
    """Patch what a module's classes make for trainers from their constructors on."""
    try:
        from .parts import open_parts

        open_parts(module, _known_now(), selected, lambda line: _say(f"sloth-plugins: {line}"))
    except Exception as error:  # noqa: BLE001 - as above
        _say(f"sloth-plugins: {module.__name__} is left as it is ({type(error).__name__}: {error})")


def selected() -> Selection | None:
    """What is active now; None where nothing is."""
    return None if _active is None else _active.selection


def enter(model: Any, is_compiled: bool = False, trainer: Any = None) -> None:
    """A model enters training: patch it and its trainer, where that is known, and print the report, once.

    A user's mistake ends the process with exit code 2. Any failure of our own leaves the model stock and says so.
    """
    if _active is None:
        return
    import torch

    if not isinstance(model, torch.nn.Module):
        return
    _active.reached = True
    try:
        _patch(model, _active, is_compiled, trainer)
    except SlothError as error:
        _say(f"sloth-plugins: {error}")
        raise SystemExit(2) from None
    except Exception as error:  # noqa: BLE001 - our defect must not end somebody's training; it is printed
        kind = type(model).__name__
        _say(f"sloth-plugins: {kind} trains stock, since patching it failed: {type(error).__name__}: {error}")


def _patch(model: Any, active: Activation, is_compiled: bool, trainer: Any) -> None:
    from .application import patched_modules
    from .discovery import plugins
    from .environment import conflicts
    from .patching import examine, was_patched_by_hand, was_reverted
    from .report import text
    from .trainers import trainers_of

    kind = type(model).__name__
    if was_reverted(model):
        _say(f"sloth-plugins: {kind} was reverted and trains stock; sloth_plugins.patch(model) patches it again")
        return
    if was_patched_by_hand(model):
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        keeps = "keeps the patches that it has" if any(patched_modules(model)) else "stays stock"
        _say(f"sloth-plugins: {kind} has nothing to train and {keeps}")
        return
    known = plugins()
    # Preparing what a trainer has brought is no other event, and gets no other report.
    trainer = trainer if trainer is not None else next(iter(trainers_of(model)), None)
    report = examine(model, active.selection, trainer=trainer)
    for problem in known.problems:
        _say(f"sloth-plugins: {problem}")
    for conflict in conflicts():
        _say(f"sloth-plugins: {conflict}; modules that it has changed are left alone")
    if not report.outcomes:
        _say(f"sloth-plugins: {_nothing_to_do(kind, report.unknown, known.architectures)}; it trains stock")
        return
    rendered = text(report)
    if report.changed:
        active.printed.discard(rendered)
    _say(rendered)
    if is_compiled and report.applied:
        _say("sloth-plugins: torch.compile is on: what it compiles runs upstream's forwards, which it fuses itself")


def _nothing_to_do(kind: str, unknown: tuple[str, ...], known: Iterable[str]) -> str:
    if unknown:
        return f"no architecture covers model type {unknown[0]!r} (known: {', '.join(known)})"
    return f"{kind} holds no model with a config.model_type, or a plugin has emptied the plan"


def _is_installed_program() -> bool:
    """Whether this is a command such as accelerate, torchrun, trl or pytest, which may train in other processes."""
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", "") or ""
    if module.startswith(LAUNCHER_MODULES):
        return True
    from sysconfig import get_path

    folder = os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv and sys.argv[0] else ""
    return folder == os.path.abspath(get_path("scripts"))


def _say_if_nothing_came() -> None:
    """Nothing is ever silently not applied. An exception on its way out is the better message."""
    if _active is None or _active.reached or not _active.expects_training:
        return
    if parent_process() is not None or _is_installed_program():
        return
    patching = sys.modules.get(f"{__package__}.patching")
    if getattr(sys, "last_type", None) is not None or (patching is not None and patching.was_called_by_hand()):
        return
    _say(
        f"sloth-plugins: {VARIABLE}={_active.selection.text!r} was set, but in this process no model entered "
        "Trainer.train or Accelerator.prepare, so nothing was patched; a loop of your own calls "
        "sloth_plugins.patch(model)"
    )
