"""The adapters of a layer in the dtype that its products are computed in, cast together and not one by one."""

from collections.abc import Sequence

import torch

from ..kernels.ops.copies import Copies
from .group import Group
from .joint_group import JointGroup


class AdapterCopies:
    """Gives each group its A, below each other in one tensor [r, k], and its B, [n, r] each, in `dtype`.

    What is in that dtype and alone in its group is used where it lies. The others get memory of their own here, and so
    do those whose group wants all B in one tensor.
    """

    __slots__ = ("_copies",)

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
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
                    pairs.append((adapter.a.detach(), group.a[cols]))
                group.b[i] = copy = _place_of_b(group, i, adapter.b, dtype)
                if copy.data_ptr() != adapter.b.data_ptr():
                    pairs.append((adapter.b.detach(), copy))
        self._copies = Copies([source for source, _ in pairs], [target for _, target in pairs])

    def refresh(self) -> None:
        """Copy the adapters as they are now; at every forward, since an optimizer may change them unseen by torch."""
        self._copies.run()


def _place_of_b(group: Group, i: int, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the B [n, r] of a group's projection is used."""
    if isinstance(group, JointGroup) and group.b_joint is not None:
        return group.b_joint[group.outputs[i], group.cols[i]]
    return b.detach() if b.dtype is dtype else torch.empty(b.shape, dtype=dtype, device=b.device)
