"""The pluggy manager: who declares what. One typed method per hook, and no plugin can break another.

A plugin that raises is reported once, by name, and left out; training goes on without it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pluggy

from sloth_plugins.registry import (
    ENTRY_POINT_GROUP,
    PROJECT,
    ArchitectureSpec,
    Environment,
    Patch,
    Plan,
    PlanItem,
    Report,
    Skip,
    TrainerSpec,
    hookspecs,
)

BUILTIN = ("llama", "mistral", "qwen", "gemma", "phi", "trl", "vllm", "trainer", "layouts")


@dataclass(frozen=True, slots=True)
class Problem:
    """A plugin that could not be used, in whole or in part."""

    plugin: str
    message: str

    def __str__(self) -> str:
        """One line."""
        return f"plugin {self.plugin!r} {self.message}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fault_of(items: Any) -> str | None:
    """What is wrong with the items of a plan, or None."""
    if not isinstance(items, list):
        return repr(items)
    for item in items:
        if not isinstance(item, PlanItem):
            return f"{item!r}, which is not a PlanItem,"
    names = [(item.architecture, item.patch.name) for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else f"{':'.join(twice)} twice"


class Plugins:
    """All plugins of this installation: the built-in ones first, then entry points by name."""

    def __init__(self, builtin: Iterable[str] = BUILTIN, *, load_entry_points: bool = True) -> None:
        self.problems: list[Problem] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        for name in builtin:
            self._register(import_module(f"sloth_plugins.patches.{name}"), name)
        if load_entry_points:
            self._load_entry_points()
        self.architectures: dict[str, ArchitectureSpec] = {}
        self.trainers: dict[str, TrainerSpec] = {}
        self._owner: dict[str, str] = {}
        self._collect_architectures()
        self._collect_trainers()
        self._patches = {name: self._collect_patches(spec) for name, spec in self.architectures.items()}
        self._patches |= {name: spec.patches for name, spec in self.trainers.items()}

    def _load_entry_points(self) -> None:
        for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
            try:
                module = entry.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a third party's import may raise anything
                self.problems.append(Problem(entry.name, f"({entry.value}) cannot be imported: {_one_line(error)}"))
            else:
                self._register(module, entry.name)

    def _register(self, module: object, name: str) -> None:
        if self._manager.has_plugin(name):
            name = f"{name}@{getattr(module, '__name__', 'another')}"
        try:
            self._manager.register(module, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self.problems.append(Problem(name, f"does not fit the hooks: {_one_line(error)}"))

    def _each(
        self, hook: str, *, latest_first: bool = False, many: bool = False, **arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        """Every plugin's own result of a hook; one that raises is reported and left out.

        In registration order, so that what is built in stands; `latest_first` where a plugin may answer in its stead.
        With `many` the results are lists, and a plugin whose result is no iterable counts as one that raises.
        """
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        for implementation in reversed(implementations) if latest_first else implementations:
            if implementation.wrapper or implementation.hookwrapper:
                self.report_problem(implementation.plugin_name, f"wraps {hook}; hook wrappers are not supported")
                continue
            accepted = {name: arguments[name] for name in implementation.argnames}
            try:
                result = implementation.function(**accepted)
                result = list(() if result is None else result) if many else result
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a third party's hook may raise anything
                self.report_problem(implementation.plugin_name, f"raised in {hook}: {_one_line(error)}")
            else:
                yield implementation.plugin_name, result

    def report_problem(self, plugin: str, message: str) -> None:
        """Remember a problem, once."""
        problem = Problem(plugin, message)
        if problem not in self.problems:
            self.problems.append(problem)

    def _collect_architectures(self) -> None:
        claimed: dict[str, str] = {}
        for plugin, specs in self._each("sloth_architectures", many=True):
            for spec in specs:
                if not isinstance(spec, ArchitectureSpec):
                    self.report_problem(plugin, f"declares {spec!r}, which is not an ArchitectureSpec")
                    continue
                taken = [("architecture", spec.name, self._owner.get(spec.name))]
                taken += [("model type", kind, claimed.get(kind)) for kind in spec.model_types]
                duplicate = next((entry for entry in taken if entry[2] is not None), None)
                if duplicate is not None:
                    self._report_duplicate(plugin, *duplicate)
                    continue
                self.architectures[spec.name] = spec
                self._owner[spec.name] = plugin
                claimed.update(dict.fromkeys(spec.model_types, plugin))

    def _collect_trainers(self) -> None:
        for plugin, specs in self._each("sloth_trainers", many=True):
            for spec in specs:
                if not isinstance(spec, TrainerSpec):
                    self.report_problem(plugin, f"declares {spec!r}, which is not a TrainerSpec")
                elif spec.name in self._owner:
                    self._report_duplicate(plugin, "trainer spec", spec.name, self._owner[spec.name])
                else:
                    self.trainers[spec.name] = spec
                    self._owner[spec.name] = plugin

    def _report_duplicate(self, plugin: str, what: str, name: str, other: str | None) -> None:
        self.report_problem(
            plugin, f"declares {what} {name!r}, which plugin {other!r} already declares; {other!r} stands"
        )

    def _collect_patches(self, spec: ArchitectureSpec) -> tuple[Patch, ...]:
        patches = {patch.name: patch for patch in spec.patches}
        owner = dict.fromkeys(patches, self._owner[spec.name])
        for plugin, extra in self._each("sloth_patches", many=True, architecture=spec):
            for patch in extra:
                if not isinstance(patch, Patch):
                    self.report_problem(plugin, f"adds {patch!r} to {spec.name}, which is not a Patch")
                elif patch.name in patches:
                    other = owner[patch.name]
                    self.report_problem(
                        plugin,
                        f"adds patch {patch.name!r} to {spec.name}, which plugin {other!r} already declares; "
                        f"{other!r} stands",
                    )
                else:
                    patches[patch.name] = patch
                    owner[patch.name] = plugin
        return tuple(patches.values())

    @property
    def specs(self) -> tuple[ArchitectureSpec | TrainerSpec, ...]:
        """All that has patches: the architectures, then the trainers."""
        return *self.architectures.values(), *self.trainers.values()

    def patches(self, spec: str) -> tuple[Patch, ...]:
        """All patches of an architecture, its own and then those that other plugins add, or of a trainer spec."""
        return self._patches[spec]

    def owner(self, spec: str) -> str:
        """The plugin that declares an architecture or a trainer spec."""
        return self._owner[spec]

    def catalogue(self) -> dict[str, tuple[str, ...]]:
        """Patch names by name of architecture or trainer spec, and by family name."""
        names: dict[str, dict[str, None]] = {}
        for spec in self.specs:
            for name in (spec.family, spec.name):
                names.setdefault(name, {}).update(dict.fromkeys(patch.name for patch in self._patches[spec.name]))
        return {name: tuple(patches) for name, patches in names.items()}

    def architecture_of(self, config: Any) -> ArchitectureSpec | None:
        """The architecture of a config: a plugin's answer first, else by `model_type`."""
        for plugin, name in self._each("sloth_architecture_of", latest_first=True, config=config):
            if name is None:
                continue
            if isinstance(name, str) and name in self.architectures:
                return self.architectures[name]
            self.report_problem(plugin, f"names architecture {name!r}, which nobody declares")
        model_type = getattr(config, "model_type", None)
        return next((spec for spec in self.architectures.values() if model_type in spec.model_types), None)

    def adjust_plan(self, plan: Plan, environment: Environment) -> None:
        """Let every plugin change the plan in place."""
        before = list(plan.items)
        for plugin, _ in self._each("sloth_adjust_plan", plan=plan, environment=environment):
            fault = _fault_of(plan.items)
            if fault is not None:
                self.report_problem(plugin, f"left {fault} in the plan; its changes are undone")
                plan.items = before
            before = list(plan.items)

    def check(self, patch: Patch, module: Any, environment: Environment) -> Skip | None:
        """The first refusal of a patch for a module, or None."""
        arguments = {"patch": patch, "module": module, "environment": environment}
        for plugin, skip in self._each("sloth_check", latest_first=True, **arguments):
            if isinstance(skip, Skip):
                return skip
            if skip is not None:
                self.report_problem(plugin, f"answered sloth_check with {skip!r}, which is neither Skip nor None")
        return None

    def report(self, report: Report) -> None:
        """Tell every plugin what was applied."""
        for _ in self._each("sloth_report", report=report):
            pass


@cache
def plugins() -> Plugins:
    """The plugins of this process, loaded once."""
    return Plugins()
