"""The model card of what is pushed: what it was made from, with what, and how it was trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import SlothError
from .checkpoint import line
from .sources import ADAPTER, model_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = "README.md"
TAG = "sloth-plugins"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


def write_card(
    folder: Path, source: Any, made: str, *, datasets: str | Iterable[str] | None = None, library: str = "transformers"
) -> None:
    """Write `folder`/README.md, the `card_of` what was exported."""
    card_of(source, made, datasets=datasets, library=library).save(folder / CARD)


def card_of(
    source: Any, made: str, *, datasets: str | Iterable[str] | None = None, library: str = "transformers"
) -> ModelCard:
    """The card of what is exported of `source` (a folder or a live model); `made` says in a few words what it is.

    `datasets` names the data, where the run's own card does not.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, adapter = _origin(source)
    names = [datasets] if isinstance(datasets, str) else list(datasets or _datasets(source))
    data = ModelCardData(
        base_model=base if base and not _is_local(base) else None,
        datasets=names or None,
        library_name=library,
        tags=[TAG],
    )
    facts = {
        "Base model": _shown(base) if base else "not known",
        "Data": ", ".join(names) or "not stated",
        "What this is": made,
        "Adapter": adapter,
        "Patches": _patches(source),
        "Versions": ", ".join([f"sloth-plugins {__version__}", *_versions()]),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    text = f"# {_title(base)}\n\nExported by [sloth-plugins](https://pypi.org/project/sloth-plugins/).\n\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}| | |\n|---|---|\n{rows}\n")


def _origin(source: Any) -> tuple[str, str]:
    """The base's name, and the adapter in a few words."""
    if isinstance(source, str | Path):
        folder = model_folder(Path(source))
        file = folder / (ADAPTER if (folder / ADAPTER).is_file() else "config.json")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SlothError(f"{file} cannot be read: {line(error)}") from None
        name = config.get("base_model_name_or_path") or config.get("_name_or_path") or ""
        return name, _adapter(config) if file.name == ADAPTER else ""
    model = source
    while not hasattr(model, "config") and hasattr(model, "module"):  # data-parallel wrappers
        model = model.module
    adapters = getattr(model, "peft_config", None) or {}
    active = [adapters[name] for name in _active(model) if name in adapters] if adapters else []
    name = getattr(active[0], "base_model_name_or_path", None) if active else None
    return name or getattr(model.config, "_name_or_path", "") or "", "; ".join(_adapter(a.to_dict()) for a in active)


def _active(model: Any) -> list[str]:
    active = getattr(model, "active_adapters", [])
    return list(active() if callable(active) else active)


def _adapter(config: dict[str, Any]) -> str:
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    targets = config.get("target_modules") or ()
    # Of all linear layers PEFT records each by its whole name; the last part says which they are.
    where = targets if isinstance(targets, str) else ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
    return f"{kind} r={config.get('r')}, alpha={config.get('lora_alpha')} on {where}"


def _datasets(source: Any) -> list[str]:
    """What the run's own card names: TRL writes one."""
    if not isinstance(source, str | Path):
        return []
    from huggingface_hub import ModelCard

    for folder in (Path(source), model_folder(Path(source))):
        if (folder / CARD).is_file():
            try:
                found = ModelCard.load(folder / CARD).data.datasets
            except Exception:  # noqa: BLE001 - somebody's card, of any content: without valid metadata it names nothing
                continue
            return [found] if isinstance(found, str) else list(found or [])
    return []


def _patches(source: Any) -> str:
    """What is applied to a live model. A folder does not say what its run had."""
    if isinstance(source, str | Path):
        return "not stated: exported from a folder"
    from ..application import patched, patched_modules

    states = [state for module in patched_modules(source) if (state := patched(module)) is not None]
    counts = Counter(binding.patch.name for state in states for binding in state.bindings)
    return ", ".join(f"{name} ({count} modules)" for name, count in counts.items()) or "none"


def _versions() -> Iterable[str]:
    for name in LIBRARIES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _is_local(name: str) -> bool:
    """Whether the base is no model of the Hub: the names of a machine's folders are nobody else's business."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1 or Path(name).exists()


def _shown(base: str) -> str:
    return Path(base).name if _is_local(base) else f"[{base}](https://huggingface.co/{base})"


def _title(base: str) -> str:
    return f"{Path(base).name}, fine-tuned" if base else "A fine-tuned model"
