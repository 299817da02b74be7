"""Names of a package that are loaded on first use: importing the package costs next to nothing."""

from collections.abc import Callable, Mapping
from typing import Any


def loader(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package whose names are in the modules that `home` says, relative to it."""

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{home[name]}", package), name)

    return load
