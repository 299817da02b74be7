"""A model that runs with one decoder layer in memory at a time, each read from the checkpoint when it is its turn."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SlothError
from ..export.naming import checkpoint_names
from ..export.weights import Weights

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer within a decoder layer."""

    name: str
    """The module's whole path."""
    weight: str
    """The weight's name in the checkpoint."""
    layer: int
    rows: int
    columns: int

    @property
    def kind(self) -> str:
        """The last part of its path, `down_proj` for one."""
        return self.name.rpartition(".")[2]


class Streamed:
    """The skeleton of a model whose weights are read from `weights` where they are used.

    `dtype` is what it computes in, on `device`.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self.weights, self.device, self.dtype = weights, device, dtype
        self.model = _empty(weights.config)
        self.prefix, self.layers = _decoder_layers(self.model)
        self.names = self._stored_names()
        self.linears = [self._linears(index) for index in range(len(self.layers))]
        """The plain linear layers of each decoder layer, in the order of its modules."""
        inside = {linear.name for row in self.linears for linear in row}
        self._in_tuples = False
        self.outside = sorted(
            name for name, module in self.model.named_modules() if type(module) is nn.Linear and name not in inside
        )
        """Linear layers that no decoder layer has: the head, for one."""

    def _stored_names(self) -> dict[str, str]:
        own = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        return {name: name for name in own} | checkpoint_names(self.model, own)

    def _linears(self, index: int) -> list[Linear]:
        found = []
        for name, module in self.layers[index].named_modules():
            if type(module) is nn.Linear:
                path = f"{self.prefix}.{index}.{name}"
                rows, columns = module.weight.shape
                weight = self.names[f"{path}.weight"]
                found.append(Linear(name=path, weight=weight, layer=index, rows=rows, columns=columns))
        return found

    @property
    def bytes(self) -> int:
        """What the weights of all layers take in 16 bits."""
        return sum(self.layer_bytes(index) for index in range(len(self.layers)))

    def layer_bytes(self, index: int) -> int:
        """What a layer's weights take in 16 bits."""
        return sum(2 * parameter.numel() for parameter in self.layers[index].parameters())

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights on the device, which are gone afterwards."""
        with self._filled(self.layers[index], f"{self.prefix}.{index}.") as layer:
            yield layer

    def module_of(self, layer: nn.Module, linear: Linear) -> nn.Linear:
        """The module of `linear` in its decoder layer."""
        found = layer.get_submodule(linear.name.removeprefix(f"{self.prefix}.{linear.layer}."))
        assert isinstance(found, nn.Linear)
        return found

    def embed(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """What `rows` of ids [n, tokens] are when they enter the first layer, on the host, and how layers are called.

        All rows have the same length and no padding, so that a layer is called alike for each.
        """
        calls: list[Call] = []
        hidden = []
        with self._outer(), torch.no_grad():
            self._in_tuples = self._expects_tuples(rows[0])
            for row in rows:
                calls.clear()
                self._run_recorded(row, calls, self._in_tuples)
                hidden.append(calls[0][0][0].to(self.dtype).cpu())
        return torch.cat(hidden), [(args[1:], kwargs) for args, kwargs in calls]

    def call(self, layer: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """One decoder layer on `hidden` [n, tokens, width], as `embed` saw it called."""
        args, kwargs = call
        out = layer(hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _run_recorded(self, row: torch.Tensor, calls: list[Call], in_tuples: bool) -> None:
        """The model's own forward, on layers that note how they are called and all give what the first one gets."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            calls.append((args, kwargs))
            first = calls[0][0][0]
            return (first,) if in_tuples else first

        with _standing_in(self.layers, forward):
            self._decoder()(input_ids=row[None].to(self.device), use_cache=False)

    def _expects_tuples(self, row: torch.Tensor) -> bool:
        """Whether layers give tuples, as those of some families did: the norm above them takes no tuple as it is."""
        try:
            self._run_recorded(row, [], True)
        except (AttributeError, TypeError):
            return False
        return True

    @contextmanager
    def top(self) -> Iterator[Any]:
        """A function from the last layer's output [1, tokens, width] to logits in fp32 [tokens, vocabulary]."""

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            # The model's own forward, with its softcap or scale, on layers that only pass the result on.
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            with _standing_in(self.layers, lambda *args, **kwargs: (hidden,) if self._in_tuples else hidden):
                out: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return out.float().flatten(0, -2)

        with self._outer(head=True):
            yield logits

    def _decoder(self) -> nn.Module:
        """The module whose forward calls the layers."""
        found: nn.Module = self.model.get_submodule(self.prefix.rpartition(".")[0])
        return found

    @contextmanager
    def _outer(self, head: bool = False) -> Iterator[None]:
        """All but the layers on the device; the head only where it is asked for."""
        inside = {id(parameter) for parameter in self.layers.parameters()}
        output = None if head else self.model.get_output_embeddings()
        with self._filled(self.model, "", inside, output):
            yield

    @contextmanager
    def _filled(
        self, module: nn.Module, prefix: str, skip: Set[int] = frozenset(), without: nn.Module | None = None
    ) -> Iterator[nn.Module]:
        read: dict[str, torch.Tensor] = {}
        places: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name, owner in module.named_modules():
                if owner is without:
                    continue
                for leaf, parameter in list(owner._parameters.items()):
                    if parameter is None or id(parameter) in skip:
                        continue
                    path = ".".join(filter(None, (name, leaf)))
                    places.append((owner, leaf, parameter))
                    stored = self._stored(f"{prefix}{path}")
                    if stored not in read:
                        read[stored] = self.weights.read(stored).to(self.device, self.dtype)
                    owner._parameters[leaf] = nn.Parameter(read[stored], requires_grad=False)
                for leaf, buffer in owner._buffers.items():
                    owner._buffers[leaf] = None if buffer is None else buffer.to(self.device)
            yield module
        finally:
            for owner, leaf, parameter in places:
                owner._parameters[leaf] = parameter

    def _stored(self, name: str) -> str:
        tied: dict[str, str] = getattr(getattr(self.weights, "base", None), "tied", {})
        stored = self.names[name]
        return tied.get(stored, stored)


def _empty(config: Any) -> Any:
    """The config's model without memory for its parameters; buffers, which a checkpoint does not hold, are there."""
    import transformers
    from accelerate import init_empty_weights

    architecture = (config.architectures or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise SlothError(f"transformers {transformers.__version__} has no class {architecture!r} to read this model by")
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    return model.eval().requires_grad_(False)


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, with its path: the one with the most parameters in linear layers."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}

    def size(name: str) -> int:
        return sum(m.weight.numel() for m in lists[name].modules() if type(m) is nn.Linear)

    best = max(lists, key=size, default="")
    if not best or not size(best):
        raise SlothError(f"{type(model).__name__} has no list of decoder layers with plain linear layers to quantise")
    return best, lists[best]


@contextmanager
def _standing_in(layers: nn.ModuleList, forward: Any) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
