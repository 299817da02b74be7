"""The flag's life in one process: read it, wait for the seams, patch what passes, and say so if nothing did."""

import atexit
import os
import sys
from dataclasses import dataclass, field
from multiprocessing import parent_process
from types import ModuleType
from typing import Any

from . import seams
from .errors import SlothError
from .processes import rank
from .selection import VARIABLE, Selection, check_names, parse
from .watching import Watcher

# Programs that start training processes; no model is expected to train in them.
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")
LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed.")


@dataclass(slots=True)
class Activation:
    """What is active: the selection, whether a model has come, and which lines were printed."""

    selection: Selection
    watcher: Watcher = field(default_factory=Watcher)
    reached: bool = False
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
    from .discovery import plugins

    known = plugins()
    if known.problems:
        plugins.cache_clear()
    else:
        check_names(selection, known.catalogue())


def activate(selection: str | None = None) -> None:
    """Patch every model that enters training in this process from now on.

    `selection` has the form of SLOTH_PLUGINS and defaults to it. Safe to call twice; the last call's selection holds.
    Raises `SlothError` for a selection that cannot be read or names something unknown.
    """
    global _active
    parsed = parse(os.environ.get(VARIABLE) if selection is None else selection)
    if parsed.is_off:
        deactivate()
        return
    if parsed.names_something:
        _check_names_now(parsed)
    if _active is not None:
        _active.selection = parsed
        return
    _active = Activation(parsed)
    atexit.register(_say_if_nothing_came)
    for module in seams.SEAMS:
        _active.watcher.when_imported(module, _module_came)


def deactivate() -> None:
    """Take the seams away again; models that are patched stay so."""
    global _active
    if _active is not None:
        _active.watcher.stop()
        seams.close_seams()
        atexit.unregister(_say_if_nothing_came)
        _active = None


def _module_came(module: ModuleType) -> None:
    seams.open_seams(module, enter)


def enter(model: Any) -> None:
    """A model enters training: patch it and print the report, once.

    A user's mistake ends the process with exit code 2. Any failure of our own leaves the model stock and says so.
    """
    if _active is None:
        return
    import torch

    if not isinstance(model, torch.nn.Module):
        return
    _active.reached = True
    try:
        _patch(model, _active)
    except SlothError as error:
        print(f"sloth-plugins: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the process ends with this line
        raise SystemExit(2) from None
    except Exception as error:  # noqa: BLE001 - our defect must not end somebody's training; it is printed
        kind = type(model).__name__
        _say(f"sloth-plugins: {kind} trains stock, since patching it failed: {type(error).__name__}: {error}")


def _patch(model: Any, active: Activation) -> None:
    from .discovery import plugins
    from .environment import conflicts
    from .patching import examine, reverted
    from .report import text

    kind = type(model).__name__
    if model in reverted:
        _say(f"sloth-plugins: {kind} was reverted and trains stock; sloth_plugins.patch(model) patches it again")
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        _say(f"sloth-plugins: {kind} has nothing to train and stays stock")
        return
    known = plugins()
    report = examine(model, active.selection)
    for problem in known.problems:
        _say(f"sloth-plugins: {problem}")
    for conflict in conflicts():
        _say(f"sloth-plugins: {conflict}; modules that it has changed are left alone")
    if not report.outcomes:
        what = f"model type {report.unknown[0]!r}" if report.unknown else f"{kind}, which has no config.model_type"
        _say(f"sloth-plugins: no architecture covers {what} (known: {', '.join(known.catalogue())}); it trains stock")
    else:
        rendered = text(report)
        if report.changed:
            active.printed.discard(rendered)
        _say(rendered)


def _is_launcher() -> bool:
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", "") or ""
    return os.path.basename(sys.argv[0] if sys.argv else "") in LAUNCHERS or module.startswith(LAUNCHER_MODULES)


def _say_if_nothing_came() -> None:
    """Nothing is ever silently not applied. An exception on its way out is the better message."""
    if _active is None or _active.reached or parent_process() is not None or _is_launcher():
        return
    patching = sys.modules.get(f"{__package__}.patching")
    if getattr(sys, "last_type", None) is not None or (patching is not None and patching.called_by_hand):
        return
    _say(
        f"sloth-plugins: {VARIABLE}={_active.selection.text!r} was set, but no model entered Trainer.train or "
        "Accelerator.prepare in this process, so nothing was patched; "
        "a loop of your own calls sloth_plugins.patch(model)"
    )
