"""A decoder layer for one token of each row, over a cache."""

from collections.abc import Mapping
from typing import Any

import torch

from ..blocks.attention_block import rotate, split_heads
from ..blocks.decoder_layer import compute_dtype, layout_of, without_autocast
from ..blocks.group import Group
from ..blocks.mlp_block import gate_and_up
from ..blocks.policy import is_checkpointed
from ..blocks.projection import Refused
from ..blocks.reading import attention_function, attention_terms, check_attention, parent_of, read_layer
from ..blocks.run import rows
from ..kernels.ops.block_norm import Norm, norm_rows
from ..kernels.ops.common import kernels_for
from ..kernels.ops.decoding import AddedTerm, add_low_rank, decode_attention, low_rank

Tensor = torch.Tensor


class LayerStep:
    """A layer as it was read for one call of `generate`: base products as they are, adapters beside them, unmerged."""

    def __init__(self, layer: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Read a layer from the arguments of its forward. Raises `Refused` for what a step cannot compute."""
        layout = layout_of(layer)
        if layout is None:
            raise Refused("its layers are not patched")
        if is_checkpointed(layer):
            raise Refused("its layers are checkpointed")
        x, (cos, _) = given["hidden_states"], given["position_embeddings"]
        self.dtype = compute_dtype(x)
        self.parts = read_layer(layer, layout, x, self.dtype, inference=True)
        attention: Any = parent_of(layer, layout.o)[1]
        check_attention(attention, self.parts, cos)
        if not getattr(attention, "is_causal", True):
            raise Refused("its attention is not causal")
        _, implementation = attention_function(attention)
        if implementation == "custom":
            raise Refused("its attention is somebody's own function")
        if any(group.has_dropout for group in self.parts.groups):
            raise Refused("it is in training mode, with dropout in its adapters")
        terms = attention_terms(attention, layout)
        self.scaling: float = attention.scaling
        self.window: int | None = terms.get("sliding_window")
        self.softcap: float | None = terms.get("softcap")
        self.scales = [_scales(group, x.device) for group in self.parts.groups]
        self.parts.copies.refresh()

    def __call__(self, given: Mapping[str, Any], keys: Tensor, values: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output [B, 1, h]; its key and value of this token are put into the cache.

        keys and values [B, Hk, capacity, D]; `at` are the rows' numbers and how many tokens each has before this one,
        both [B].
        """
        hidden = given["hidden_states"]
        cos, sin = given["position_embeddings"]
        with without_autocast(hidden.device.type):
            return self._step(rows(hidden), cos, sin, keys, values, *at).view(hidden.shape)

    def _step(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, row: Tensor, lengths: Tensor
    ) -> Tensor:
        parts = self.parts
        outputs = self._project(0, self._normed(x, parts.attention_norm, parts.qkv))
        q, k, v = split_heads(parts, outputs, (x.shape[0], 1))
        q, k = rotate(parts, cos, sin, q, k, {})
        keys[row, :, lengths] = k[:, 0].to(keys.dtype)
        values[row, :, lengths] = v[:, 0].to(values.dtype)
        found = decode_attention(q[:, 0], keys, values, lengths, self.scaling, self.window, self.softcap)
        # As in the blocks: both parts of a parallel layer are summed before the residual.
        mid = self._leave(1, found.flatten(1), parts.attention_output_norm, None if parts.is_parallel else x)
        outputs = self._project(2, self._normed(x if parts.is_parallel else mid, parts.mlp_norm, parts.up))
        out = self._leave(3, self._activated(outputs), parts.mlp_output_norm, mid)
        return out + x if parts.is_parallel else out

    def _normed(self, x: Tensor, norm: Norm, group: Group) -> Tensor:
        normed = torch.empty(x.shape, dtype=group.dtype, device=x.device)
        norm_rows(x, norm, normed)
        return normed

    def _activated(self, outputs: list[Tensor]) -> Tensor:
        parts = self.parts
        if parts.is_gated:
            gate, up = gate_and_up(parts, outputs)
            activated: Tensor = kernels_for("glu", gate, up).glu_fwd(gate, up, parts.activation)
        else:
            activated = kernels_for("activation", outputs[0]).activate_fwd(outputs[0], parts.activation)
        return activated

    def _project(self, index: int, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        """The outputs [B, n] of a group for x [B, k], plus `residual` in its only one."""
        group, scales = self.parts.groups[index], self.scales[index]
        if group.a is None or scales is None:
            return group.forward(x, None, residual, with_adapters=False)
        outputs = group.forward(x, None, with_adapters=False)
        columns = [outputs[0][:, at] for at in group.outputs] if len(outputs) == 1 else outputs
        trios = zip(columns, group.b, group.cols, strict=True)
        terms = [AddedTerm(y, b, cols) for y, b, cols in trios if b is not None]
        add_low_rank(low_rank(x, group.a, scales), terms, residual)
        return outputs

    def _leave(self, index: int, x: Tensor, norm: Norm | None, residual: Tensor | None) -> Tensor:
        """residual [B, h], if there is one, plus the one output of a group, after `norm` where there is one."""
        joins = norm is None and residual is not None and residual.dtype is self.dtype
        (out,) = self._project(index, x, residual if joins else None)
        if joins or residual is None:
            return out
        if norm is None:
            return residual + out
        total = torch.empty_like(residual)
        norm_rows(out, norm, total, residual)
        return total


def _scales(group: Group, device: torch.device) -> Tensor | None:
    """The scale of each row of `group.a` [r], in fp32."""
    present = group.present()
    if not present:
        return None
    each = [adapter.scale for adapter in present for _ in range(adapter.a.shape[0])]
    return torch.tensor(each, dtype=torch.float32, device=device)
