"""Run a callback once a module has been imported, whenever that is: before, now or later."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


class Watcher(MetaPathFinder):
    """A finder that finds nothing itself; it sees every import and leaves `sys.meta_path` when nothing is awaited.

    A module that is being imported when the watcher starts is picked up at the next import that follows its end.
    """

    def __init__(self) -> None:
        self._awaited: dict[str, Callback] = {}

    def when_imported(self, name: str, callback: Callback) -> None:
        """Call `callback(module)` once module `name` is fully imported."""
        self._awaited[name] = callback
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._sweep()

    def stop(self) -> None:
        """Await nothing more."""
        self._awaited.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _finish(self, name: str, module: ModuleType) -> None:
        callback = self._awaited.pop(name, None)
        if not self._awaited:
            self.stop()
        if callback is not None:
            callback(module)

    def _sweep(self) -> None:
        for name in tuple(self._awaited):
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._finish(name, module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing, except that an awaited module's loader tells us when it is done."""
        self._sweep()
        if fullname not in self._awaited:
            return None
        for finder in sys.meta_path:
            # Import itself passes over finders without find_spec.
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None and spec.loader is not None:
                self._tell_when_loaded(spec)
                return spec
        return None

    def _tell_when_loaded(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None, "the caller has checked it"
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = load  # type: ignore[method-assign]  # ours was for this one import
            load(module)
            self._finish(spec.name, module)

        loader.exec_module = exec_module  # type: ignore[method-assign]  # a loader serves one spec
