"""The forward of a decoder layer as two fused blocks, wherever its layout and its state allow it."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.dispatch import backend_for
from ..kernels.notices import say_once
from ..kernels.ownership import saving_is_plain
from .attention import Attention
from .attention_block import AttentionBlock
from .mlp_block import MLPBlock
from .projection import Refused
from .reading import Layout, attention_function, read_layer
from .policy import choose, is_checkpointed
from .run import Parts, Run

Forward = Callable[..., Any]
# Arguments of the layer that its attention does not get.
OWN = ("hidden_states", "attention_mask", "past_key_values", "past_key_value", "position_embeddings")


def returns_tuple(forward: Forward) -> bool:
    """Whether upstream's forward returns `(hidden_states, ...)`; raises ValueError where its source does not say."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    found = {ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value}
    if found == {"hidden_states"}:
        return False
    if found == {"outputs"}:
        return True
    raise ValueError(f"the layer returns {' or '.join(sorted(found)) or 'nothing'}, not its hidden states")


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _seeds(parts: Parts) -> dict[str, list[int]]:
    """A seed for each projection; drawn from torch's generator only if there is dropout, as upstream would."""
    names = ("qkv", "o", "up", "down")
    seeds = {name: [0] * len(group.projections) for name, group in zip(names, parts.groups, strict=True)}
    for name, group in zip(names, parts.groups, strict=True):
        if group.has_dropout:
            seeds[name] = torch.randint(2**31 - 1, (len(group.projections),)).tolist()
    return seeds


class _Fused:
    """A layer's forward, or rather the question whether it may run, and the run."""

    def __init__(self, original: Forward, layout: Layout) -> None:
        self.layout = layout
        self.as_tuple = returns_tuple(original)
        parameters = inspect.signature(original).parameters
        self.names = [name for name in parameters if name != "self"]
        missing = {"hidden_states", "attention_mask", "position_embeddings"} - set(self.names)
        if missing:
            raise ValueError(f"the layer takes no {' and no '.join(sorted(missing))}")

    def prepare(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, torch.Tensor]:
        """Everything that must be known before the blocks run. Raises `Refused`."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x, embeddings = given.get("hidden_states"), given.get("position_embeddings")
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or backend_for(x) is None:
            raise Refused("its input is no plain tensor [batch, sequence, features]")
        if not isinstance(embeddings, tuple | list) or len(embeddings) != 2:
            raise Refused("it gets no rotary embedding")
        caches = [name for name in ("past_key_values", "past_key_value") if given.get(name) is not None]
        # With checkpointing upstream drops the cache as well.
        if caches and not is_checkpointed(layer):
            raise Refused("a cache of keys and values is filled (use_cache=False avoids that in training)")
        if given.get("output_attentions"):
            raise Refused("attention weights are asked for")
        dtype = _compute_dtype(x)
        cos, sin = embeddings
        for table in (cos, sin):
            if backend_for(x, table) is None or table.dim() != 3 or table.requires_grad:
                raise Refused("its rotary embedding is no plain table")
        parts = read_layer(layer, self.layout, x, dtype)
        attention = self._attention(layer, given)
        if cos.shape[-1] > parts.heads[2] or cos.shape[-1] % 2:
            raise Refused(f"a rotary embedding of {cos.shape[-1]} features for heads of {parts.heads[2]}")
        if parts.qk_norms is not None and cos.shape[-1] != parts.heads[2]:
            raise Refused("norms of q and k with a partial rotary embedding")
        return Run(
            parts=parts,
            policy=choose(layer, x),
            dtype=dtype,
            attention=attention,
            cos=cos,
            sin=sin,
            seeds=_seeds(parts),
            may_overwrite=saving_is_plain(),
        ), x

    def _attention(self, layer: Any, given: dict[str, Any]) -> Attention:
        module = layer
        for name in self.layout.o.split(".")[:-1]:
            module = module._modules[name]
        if layer.training and getattr(module, "attention_dropout", 0.0):
            raise Refused("its attention has dropout")
        function, implementation = attention_function(module)
        keywords = {name: value for name, value in given.items() if name not in OWN}
        for keyword, attribute, own in (
            ("sliding_window", getattr(self.layout, "sliding_window", None), "sliding_window"),
            ("softcap", getattr(self.layout, "softcap", None), "attn_logit_softcapping"),
        ):
            if attribute is not None:
                keywords[keyword] = getattr(module, own, getattr(module.config, attribute, None))
        scaling = getattr(module, "scaling", None)
        if scaling is None:
            raise Refused("its attention has no scaling")
        return Attention(module, function, implementation, given.get("attention_mask"), scaling, keywords)

    def run(self, run: Run, x: torch.Tensor) -> Any:
        parts = run.parts
        first = [*parts.qkv.parameters(), *parts.o.parameters()]
        second = [*parts.up.parameters(), *parts.down.parameters()]
        apply_attention: Any = AttentionBlock.apply
        apply_mlp: Any = MLPBlock.apply
        # The blocks have cast what they multiply.
        with torch.autocast(x.device.type, enabled=False):
            mid = apply_attention(run, x, *first)
            out = apply_mlp(run, x, mid, *second)
        return (out,) if self.as_tuple else out


def decoder_layer(original: Forward, layout: Layout) -> Forward:
    """The forward of the layer that `layout` describes. Raises ValueError for one that it cannot describe.

    Where a condition does not hold, upstream's forward runs, and the reason is said once.
    """
    fused = _Fused(original, layout)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        pending = vars(self).pop(_PENDING, None)
        if pending is None:
            try:
                pending = fused.prepare(self, args, kwargs)
            except Refused as refused:
                say_once(f"blocks: {type(self).__name__} runs upstream's forward, because {refused}")
                return original(self, *args, **kwargs)
        return fused.run(*pending)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it is the class's
        """A layer that keeps only its input needs no checkpoint around it, so upstream is told that there is none."""
        inherited = super(_owner(type(self), __call__), self).__call__
        if not is_checkpointed(self) or torch.compiler.is_compiling():
            return inherited(*args, **kwargs)
        try:
            vars(self)[_PENDING] = fused.prepare(self, args, kwargs)
        except Refused as refused:
            say_once(f"blocks: {type(self).__name__} runs upstream's forward, because {refused}")
            return inherited(*args, **kwargs)
        held = vars(self)["gradient_checkpointing"] if "gradient_checkpointing" in vars(self) else None
        self.gradient_checkpointing = False
        try:
            return inherited(*args, **kwargs)
        finally:
            vars(self).pop(_PENDING, None)
            if held is None:
                vars(self).pop("gradient_checkpointing", None)
            else:
                self.gradient_checkpointing = held

    forward.methods = {"__call__": __call__}  # type: ignore[attr-defined]  # `resolving.bind` reads it
    return forward


_PENDING = "_sloth_pending_run"


def _owner(kind: type, method: Any) -> type:
    """The class in a module's ancestry that has this method."""
    return next(base for base in kind.__mro__ if vars(base).get("__call__") is method)
