"""The forward of a decoder layer as two fused blocks, wherever its layout and its state allow it."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..kernels.dispatch import backend_for
from ..kernels.notices import say_once
from ..kernels.ownership import saving_is_plain
from .attention import Attention
from .attention_block import AttentionBlock
from .documents import documents_of
from .graphs import GraphedLayer, graph_for
from .mlp_block import MLPBlock
from .policy import Policy, choose, is_checkpointed
from .projection import Refused
from .reading import Layout, attention_function, attention_terms, check_attention, parent_of, read_layer
from .run import Parts, Run
from .substitute import substitute
from .watch import Watch

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


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of an input like x are computed in here and now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _seeds(parts: Parts, device: torch.device) -> dict[str, Sequence[int]]:
    """A seed for each projection, drawn where there is dropout, from the generator that upstream's draws from."""
    seeds: dict[str, Sequence[int]] = {}
    for name, group in zip(("qkv", "o", "up", "down"), parts.groups, strict=True):
        count = len(group.projections)
        seeds[name] = _draw(count, device) if group.has_dropout else [0] * count
    return seeds


def _draw(count: int, device: torch.device) -> list[int]:
    """So many seeds of 31 bits; on a GPU without waiting for it, by moving its generator on as a kernel would."""
    if device.type != "cuda":
        drawn: list[int] = torch.randint(2**31 - 1, (count,)).tolist()
        return drawn
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return [zlib.crc32(f"{generator.initial_seed()} {offset} {i}".encode()) >> 1 for i in range(count)]


class without_autocast:
    """Within it, products are in the dtype of what is multiplied: the blocks have cast it. (torch.autocast is slow.)"""

    __slots__ = ("kind", "was")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.was = torch.is_autocast_enabled(kind)

    def __enter__(self) -> None:
        if self.was:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *error: object) -> None:
        if self.was:
            torch.set_autocast_enabled(self.kind, True)


# The last readings of a layer, newest first: with its adapter and, as a reference model of its own, without.
READINGS = 2
_readings: WeakKeyDictionary[torch.nn.Module, list[tuple[tuple[Any, ...], Watch, Parts]]] = WeakKeyDictionary()


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
        given = self.given(args, kwargs)
        x, embeddings = given.get("hidden_states"), given.get("position_embeddings")
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or backend_for(x) is None:
            raise Refused("its input is no plain tensor [batch, sequence, features]")
        if not isinstance(embeddings, tuple | list) or len(embeddings) != 2:
            raise Refused("it gets no rotary embedding")
        # With checkpointing upstream has dropped the cache.
        cache = _cache(given)
        if cache is not None and not self._only_fills(cache, layer):
            raise Refused("a cache of keys and values is read")
        if given.get("output_attentions"):
            raise Refused("attention weights are asked for")
        dtype = compute_dtype(x)
        cos, sin = embeddings
        for table in (cos, sin):
            if backend_for(x, table) is None or table.dim() != 3 or table.requires_grad:
                raise Refused("its rotary embedding is no plain table")
        parts = self._read(layer, x, dtype)
        module = parent_of(layer, self.layout.o)[1]
        check_attention(module, parts, cos)
        attention = self._attention(module, given)
        run = Run(
            parts=parts,
            policy=Policy.KEEP,
            dtype=dtype,
            attention=attention,
            cos=cos,
            sin=sin,
            seeds=_seeds(parts, x.device),
            may_overwrite=saving_is_plain(),
            is_differentiable=torch.is_grad_enabled(),
            cache=cache,
        )
        run.policy = choose(layer, x, run)
        return run, x

    def is_generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call fills or reads a cache without a gradient, where nobody expects a fused block."""
        return _cache(self.given(args, kwargs)) is not None and not torch.is_grad_enabled()

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _only_fills(self, cache: Any, layer: torch.nn.Module) -> bool:
        """Whether a cache is one that transformers makes anew for a forward in training, where nobody reads it."""
        index = getattr(parent_of(layer, self.layout.o)[1], "layer_idx", None)
        fresh = type(cache).__name__ == "DynamicCache" and index is not None
        return layer.training and torch.is_grad_enabled() and fresh and cache.get_seq_length(index) == 0

    def _read(self, layer: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Parts:
        """`read_layer`, or what it gave before if nothing has changed since."""
        key = (x.dtype, x.device, x.shape[-1], dtype, torch.is_autocast_enabled(x.device.type))
        known = _readings.setdefault(layer, [])
        for before, watch, parts in known:
            if before == key and watch.is_unchanged(layer):
                return parts
        parts = read_layer(layer, self.layout, x, dtype)
        known.insert(0, (key, Watch(layer), parts))
        del known[READINGS:]
        return parts

    def _attention(self, module: Any, given: dict[str, Any]) -> Attention:
        function, implementation = attention_function(module)
        keywords = {name: value for name, value in given.items() if name not in OWN}
        keywords |= attention_terms(module, self.layout)
        attention = Attention(module, function, implementation, given.get("attention_mask"), module.scaling, keywords)
        if attention.mask is None or not attention.is_sdpa:
            return attention
        rows, window = given["hidden_states"].shape[0], keywords.get("sliding_window")
        documents = documents_of(attention.mask, given.get("position_ids"), rows, window)
        return dataclasses.replace(attention, documents=documents)

    def run(self, run: Run, x: torch.Tensor, layer: torch.nn.Module) -> Any:
        parts = run.parts
        first = [*parts.qkv.parameters(), *parts.o.parameters()]
        second = [*parts.up.parameters(), *parts.down.parameters()]
        graph = graph_for(layer, run, x, [*first, *second])
        apply_attention: Any = AttentionBlock.apply
        apply_mlp: Any = MLPBlock.apply
        with without_autocast(x.device.type):
            if graph is not None:
                apply_graph: Any = GraphedLayer.apply
                out = apply_graph(graph, run, x, *first, *second)
                return self.returned(out)
            parts.copies.refresh()
            mid = apply_attention(run, x, *first)
            out = apply_mlp(run, x, mid, *second)
        return self.returned(out)

    def returned(self, out: torch.Tensor) -> Any:
        """Hidden states as upstream's forward returns them."""
        return (out,) if self.as_tuple else out


def _cache(given: dict[str, Any]) -> Any:
    """Upstream's cache of keys and values among a layer's arguments, under either of its names."""
    return given.get("past_key_values", given.get("past_key_value"))


# Where upstream keeps the function that checkpoints a layer.
_CHECKPOINT = "_gradient_checkpointing_func"


class _Deferred:
    """Stands in for upstream's checkpointing `function` and calls the layer's forward at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, forward: Forward, *args: Any) -> Any:
        return forward(*args)


def decoder_layer(original: Forward, layout: Layout) -> Forward:
    """The forward of the layer that `layout` describes. Raises ValueError for one that it cannot describe.

    Where a condition does not hold, upstream's forward runs, and the reason is said once.
    """
    fused = _Fused(original, layout)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        other = substitute()
        if other is not None:
            return fused.returned(other(self, fused.given(args, kwargs)))
        try:
            prepared = fused.prepare(self, args, kwargs)
        except Refused as refused:
            if not fused.is_generating(args, kwargs):
                say_once(f"blocks: {type(self).__name__} runs upstream's forward, because {refused}")
            checkpoint = getattr(self, _CHECKPOINT, None)
            if isinstance(checkpoint, _Deferred) and is_checkpointed(self):
                return checkpoint.function(functools.partial(original, self, **kwargs), *args)
            return original(self, *args, **kwargs)
        return fused.run(*prepared, self)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A layer that keeps only its input needs no checkpoint around it; `forward` decides, after the hooks."""
        inherited = super(_owner(type(self), __call__), self).__call__
        held = vars(self).get(_CHECKPOINT)
        if held is None or not is_checkpointed(self) or torch.compiler.is_compiling():
            return inherited(*args, **kwargs)
        setattr(self, _CHECKPOINT, _Deferred(held))
        try:
            return inherited(*args, **kwargs)
        finally:
            setattr(self, _CHECKPOINT, held)

    forward.methods = {"__call__": __call__}  # type: ignore[attr-defined]  # `resolving.bind` reads it
    forward.layout = layout  # type: ignore[attr-defined]  # `layout_of` reads it
    return forward


def layout_of(module: torch.nn.Module) -> Layout | None:
    """The layout of a layer that has our forward."""
    found: Layout | None = getattr(type(module).forward, "layout", None)
    return found


def _owner(kind: type, method: Any) -> Any:
    """The class in a module's ancestry that has this method."""
    return next(base for base in kind.__mro__ if vars(base).get("__call__") is method)
