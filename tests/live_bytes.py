"""Memory by counting: the bytes of all storages that operations made and that somebody still holds."""

from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, `peak` is the most bytes that lived at once of what was made since, after any operation.

    What a single operation needs inside is not seen. `products` holds the sizes (m, k, n) of all matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.products: list[tuple[int, int, int]] = []
        self._live: dict[StorageWeakRef, int] = {}
        self._known: dict[StorageWeakRef, None] = {}
        # At least what lives: storages are looked for that are gone only where it would matter.
        self._most = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(StorageWeakRef(tensor.untyped_storage()))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [item for item in args if isinstance(item, torch.Tensor)][-2:]
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref not in self._live and ref not in self._known:
                    self._live[ref] = tensor.untyped_storage().nbytes()
                    self._most += self._live[ref]
        if self._most > self.peak:
            self.peak = max(self.peak, self.living())
        return result

    def living(self) -> int:
        """The bytes that live now."""
        self._live = {ref: size for ref, size in self._live.items() if not ref.expired()}
        self._known = {ref: None for ref in self._known if not ref.expired()}
        self._most = sum(self._live.values())
        return self._most
