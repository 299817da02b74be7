"""What `sloth-plugins list` shows: read from the specs alone, so it starts at once."""

import json
from dataclasses import dataclass, field

from sloth_plugins.registry import ArchitectureSpec, Experimental, Patch, TrainerSpec, Unsupported

from .discovery import Plugins
from .planning import MINIMUM

HEADER = ("architecture", "model types", "patch", "needs", "state", "what it does")


def needs(spec: ArchitectureSpec | TrainerSpec, patch: Patch) -> str:
    """Requirements of a patch: versions, then config values."""
    versions = [*spec.requires, *patch.requires]
    if not any(text.startswith("transformers") for text in versions):
        versions += [text for text in MINIMUM if text.startswith("transformers")]
    return ", ".join([*versions, *(f"{key}={'|'.join(map(str, values))}" for key, values in patch.where.items())])


def state(patch: Patch) -> str:
    """On or off by default, or what is known against it."""
    if isinstance(patch.status, Unsupported):
        return f"unsupported: {patch.status.reason}"
    text = "on" if patch.default else "off unless named"
    return f"{text}, experimental: {patch.status.note}" if isinstance(patch.status, Experimental) else text


def covered(spec: ArchitectureSpec | TrainerSpec, patch: Patch) -> tuple[str, ...]:
    """What a patch is for: the architecture's model types, or the class of the trainer."""
    return (patch.target.partition(":")[2],) if isinstance(spec, TrainerSpec) else spec.model_types


@dataclass(slots=True)
class Entry:
    """One line: a patch of a family, for all of the family's members that have it in the same form."""

    family: str
    patch: str
    needs: str
    state: str
    summary: str
    architectures: list[str] = field(default_factory=list)
    model_types: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return self.family, ", ".join(self.model_types), self.patch, self.needs, self.state, self.summary


def entries(known: Plugins) -> list[Entry]:
    """Every patch of every architecture, then of every trainer."""
    found: dict[tuple[str, ...], Entry] = {}
    for spec in known.specs:
        for patch in known.patches(spec.name):
            key = (spec.family, patch.name, needs(spec, patch), state(patch), patch.summary)
            entry = found.setdefault(key, Entry(*key))
            entry.architectures.append(spec.name)
            entry.model_types += covered(spec, patch)
            entry.plugins.append(known.owner(spec.name))
    order = list(dict.fromkeys(entry.family for entry in found.values()))
    return sorted(found.values(), key=lambda entry: order.index(entry.family))


def as_json_text(known: Plugins) -> str:
    """The same as JSON, with the plugins that declare the architectures and trainers."""
    listed = [
        {
            "architecture": entry.family,
            "names": entry.architectures,
            "model_types": entry.model_types,
            "patch": entry.patch,
            "needs": entry.needs,
            "state": entry.state,
            "summary": entry.summary,
            "plugin": ", ".join(sorted(set(entry.plugins))),
        }
        for entry in entries(known)
    ]
    return json.dumps(listed, indent=2)
