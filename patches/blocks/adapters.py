"""The adapters of a layer in the dtype that its products are computed in, cast together and not one by one."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from .group import Group

_copies: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, ...], list[torch.Tensor], list[torch.Tensor]]] = (
    WeakKeyDictionary()
)


def load_adapters(layer: torch.nn.Module, groups: Sequence[Group], dtype: torch.dtype) -> None:
    """Give each group its A, below each other in one tensor [r, k], and its B, [n, r] each, in `dtype`.

    Where a group has one adapter that is in `dtype` already, its own memory is used. The others are copied into memory
    that the layer keeps, all in one call; that is done at every forward, because an optimizer may have changed them in
    a way that torch cannot see.
    """
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for group in groups:
        present = group.present()
        if not present:
            continue
        if len(present) == 1 and present[0].a.dtype is dtype:
            group.a = present[0].a.detach()
        else:
            group.a = torch.empty(0, dtype=dtype, device=present[0].a.device)
            sources += [adapter.a for adapter in present]
        for i, adapter in enumerate(group.adapters):
            if adapter is not None:
                group.b[i] = adapter.b.detach()
                if adapter.b.dtype is not dtype:
                    sources.append(adapter.b)
    if not sources:
        return
    key = (hash(dtype), *(number for source in sources for number in (source.data_ptr(), *source.shape)))
    known = _copies.get(layer)
    if known is None or known[0] != key:
        known = _copies[layer] = (key, *_room(groups, dtype))
    _, targets, whole = known
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)
    rest = iter(whole)
    for group in groups:
        if group.a is not None and not group.a.numel():
            group.a = next(rest)
        for i, adapter in enumerate(group.adapters):
            if adapter is not None and adapter.b.dtype is not dtype:
                group.b[i] = next(rest)


def _room(groups: Sequence[Group], dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what each source is copied to, what the groups then use), in the order of `load_adapters`."""
    targets: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    for group in groups:
        present = group.present()
        if not present:
            continue
        if not (len(present) == 1 and present[0].a.dtype is dtype):
            a = torch.empty((group.r, group.k), dtype=dtype, device=present[0].a.device)
            whole.append(a)
            targets += [
                a[cols] for cols, adapter in zip(group.cols, group.adapters, strict=True) if adapter is not None
            ]
        for adapter in present:
            if adapter.b.dtype is not dtype:
                b = torch.empty(adapter.b.shape, dtype=dtype, device=adapter.b.device)
                whole.append(b)
                targets.append(b)
    return targets, whole
