"""What `sloth-plugins list` shows: read from the specs alone, so it starts at once."""

import json
from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, Experimental, Patch, Unsupported

from .discovery import Plugins


def needs(spec: ArchitectureSpec, patch: Patch) -> str:
    """Requirements of a patch: versions, then config values."""
    parts = [*spec.requires, *patch.requires]
    parts += [f"{key}={'|'.join(map(str, values))}" for key, values in patch.where.items()]
    return ", ".join(parts)


def state(patch: Patch) -> str:
    """On or off by default, or what is known against it."""
    if isinstance(patch.status, Unsupported):
        return f"unsupported: {patch.status.reason}"
    text = "on" if patch.default else "off unless named"
    return f"{text}, experimental: {patch.status.note}" if isinstance(patch.status, Experimental) else text


def rows(known: Plugins) -> Iterator[tuple[str, str, str, str, str, str]]:
    """One row for each patch."""
    for spec in known.architectures.values():
        for patch in known.patches(spec.name):
            yield spec.name, ", ".join(spec.model_types), patch.name, needs(spec, patch), state(patch), patch.summary


def as_json_text(known: Plugins) -> str:
    """The same as JSON, with the plugin that declares each architecture."""
    keys = ("architecture", "model_types", "patch", "needs", "state", "summary")
    entries = [dict(zip(keys, row, strict=True)) | {"plugin": known.owner(row[0])} for row in rows(known)]
    return json.dumps(entries, indent=2)
