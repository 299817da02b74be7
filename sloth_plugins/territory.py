"""Which part of a model is whose: every module belongs to the nearest config above it.

A vision-language model holds a language model, a vision tower and what joins them, each with a config of its own. A
patch changes only the modules of the architecture that declares it, even where another part is built of the same
classes. A part without a config of its own belongs to what it lies in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sloth_plugins.registry import ArchitectureSpec

from .discovery import Plugins


@dataclass(slots=True)
class Territory:
    """A model's parts: the architecture of each module by its name, and what nobody covers."""

    configs: dict[str, list[Any]] = field(default_factory=dict)
    owners: dict[str, str | None] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()


def _model_type(config: Any) -> str | None:
    found = getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def _parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs that a config is composed of: what each is for (`vision` for `vision_config`), and itself."""
    for name, value in vars(config).items():
        if name.endswith("_config") and _model_type(value) is not None:
            yield name.removesuffix("_config"), value


def _all_parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a config, and theirs."""
    for role, part in _parts_of(config):
        yield role, part
        yield from _all_parts_of(part)


def survey_territory(model: Any, plugins: Plugins) -> Territory:
    """Ask for the architecture of every config in a model, and give each module to the nearest config above it."""
    territory = Territory()
    asked: dict[int, tuple[Any, ArchitectureSpec | None]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if _model_type(config) is None:
            territory.owners[name] = territory.owners.get(name.rpartition(".")[0])
            continue
        if id(config) not in asked:
            spec = plugins.architecture_of(config)
            asked[id(config)] = config, spec
            if spec is not None:
                territory.configs.setdefault(spec.name, []).append(config)
        known = asked[id(config)][1]
        territory.owners[name] = known.name if known is not None else None
    _name_the_rest(territory, asked)
    return territory


def _name_the_rest(territory: Territory, asked: dict[int, tuple[Any, ArchitectureSpec | None]]) -> None:
    """What nobody covers: beside a covered part it is a tower, else an unknown model."""
    unknown: dict[str, None] = {}
    towers: dict[str, None] = {}
    rest = [config for config, spec in asked.values() if spec is None]
    explained: set[int] = set()
    for config in rest:
        parts = list(_all_parts_of(config))
        if any(asked.get(id(part), (None, None))[1] is not None for _, part in parts):
            explained.add(id(config))
            for role, part in parts:
                if id(part) in asked and asked[id(part)][1] is None:
                    explained.add(id(part))
                    towers[f"{role} tower ({_model_type(part) or type(part).__name__})"] = None
    for config in rest:
        if id(config) not in explained:
            unknown[str(_model_type(config))] = None
    territory.unknown, territory.towers = tuple(unknown), tuple(towers)
