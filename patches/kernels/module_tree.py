"""The modules below one, and whether they are still these, for much less than walking through them.

A model with adapters has thousands of modules, and some questions about all of them come back at every step. What is
there is kept in lists that C code walks and compares, and no Python runs for a single module. (Nor `id`, which Python
reports to audit hooks, and libraries install such.)
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch

Held = dict[str, Any]
_CONTAINERS = frozenset({torch.nn.ModuleDict, torch.nn.ParameterDict})
_own = operator.itemgetter("_modules", "_parameters")


def _contents(held: Iterable[Held]) -> list[Any]:
    """The children and parameters of modules with these attributes."""
    return list(chain.from_iterable(map(dict.values, chain.from_iterable(map(_own, held)))))


def are_same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects: tensors cannot be compared otherwise."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def is_empty(module: torch.nn.Module) -> bool:
    """Whether it is a container without anything in it, as PEFT makes for adapters of other kinds."""
    return type(module) in _CONTAINERS and not module._modules and not module._parameters


class ModuleTree:
    """The modules below `root`, without itself, so that what is kept of a module does not keep it alive.

    `held` are their attributes, `kinds` their classes, each once, and `parameters` all, root's too, in torch's order.
    Those that `leave_out` holds of are known only as children.
    """

    __slots__ = ("_classes", "_contents", "_own", "held", "kinds", "modules", "parameters")

    def __init__(self, root: torch.nn.Module, leave_out: Callable[[torch.nn.Module], bool] | None = None) -> None:
        below = (module for module in root.modules() if module is not root)
        self.modules = [module for module in below if leave_out is None or not leave_out(module)]
        self.held: list[Held] = list(map(vars, self.modules))
        self._classes = list(map(type, self.modules))
        self.kinds: list[Any] = list(set(self._classes))
        self._own = _contents([vars(root)])
        self._contents = _contents(self.held)
        every = (p for held in (vars(root), *self.held) for p in held["_parameters"].values() if p is not None)
        self.parameters: list[torch.nn.Parameter] = list(dict.fromkeys(every))

    def is_of(self, root: torch.nn.Module) -> bool:
        """Whether these are all modules and parameters below `root`, and their classes, still."""
        return (
            are_same(_contents([vars(root)]), self._own)
            and are_same(list(map(type, self.modules)), self._classes)
            and are_same(_contents(self.held), self._contents)
        )
