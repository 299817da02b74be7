"""The adapters of a layer in the dtype that its products are computed in, cast together and not one by one."""

from collections.abc import Sequence

import torch

from .group import Group
from .joint_group import JointGroup


class AdapterCopies:
    """Gives each group its A, below each other in one tensor [r, k], and its B, [n, r] each, in `dtype`.

    What is in that dtype and alone in its group is used where it lies. The others get memory of their own here, and so
    do those whose group wants all B in one tensor.
    """

    __slots__ = ("_sources", "_targets")

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        for group in groups:
            present = group.present()
            if len(present) == 1 and present[0].a.dtype is dtype:
                group.a = present[0].a.detach()
            elif present:
                group.a = torch.empty((group.r, group.k), dtype=dtype, device=present[0].a.device)
            if isinstance(group, JointGroup) and present:
                group.b_joint = torch.zeros((group.n, group.r), dtype=dtype, device=present[0].a.device)
            for i, (adapter, cols) in enumerate(zip(group.adapters, group.cols, strict=True)):
                if adapter is None or group.a is None:
                    continue
                if group.a.data_ptr() != adapter.a.data_ptr():
                    self._add(group.a[cols], adapter.a)
                group.b[i] = self._copy_of_b(group, i, adapter.b, dtype)

    def _copy_of_b(self, group: Group, i: int, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(group, JointGroup) and group.b_joint is not None:
            copy = group.b_joint[group.outputs[i], group.cols[i]]
        elif b.dtype is dtype:
            return b.detach()
        else:
            copy = torch.empty(b.shape, dtype=dtype, device=b.device)
        self._add(copy, b)
        return copy

    def _add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._targets.append(target)
        self._sources.append(source.detach())

    def refresh(self) -> None:
        """Copy the adapters as they are now; at every forward, since an optimizer may change them unseen by torch."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
