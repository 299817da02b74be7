"""The loop: a forward over the prompts, then one token of each row at a time, until all rows are done.

The model's own forward runs throughout, so that embeddings, rotary tables, the last norm and the head are its own in
every version; only its decoder layers are others in a step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..blocks.projection import Refused
from ..blocks.substitute import substituting
from .cache import Cache
from .graph import captured
from .layer import LayerStep
from .sampling import Sampler
from .settings import Settings

Tensor = torch.Tensor
Steps = dict[torch.nn.Module, LayerStep]

# Steps between two questions whether rows are done, each of which waits for the device.
PERIOD = 8
# Slots that the cache has for new tokens at first, and by which it grows: rows may end long before they must.
ROOM = 1024
# Steps below which a graph costs more than it saves.
WORTH = 4
# Rotary tables that depend on the longest row, about which a forward asks the device.
BY_LENGTH = ("dynamic", "longrope")


def decode(model: Any, ids: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """The prompts [rows, width] and what follows them, [rows * copies, width + made], as transformers' `generate` does.

    `model` is a causal language model whose layers are patched. ids and mask are int64, with padding on the left.
    Raises `Refused` before anything is computed that counts.
    """
    with torch.no_grad():
        steps = read_layers(model, ids)
        prompts = ids.repeat_interleave(settings.copies, 0)
        made = _Decoding(model, steps, prompts, mask.repeat_interleave(settings.copies, 0), settings).run()
        found = torch.cat([prompts, made], dim=1)
    if ids.is_cuda:
        # What graphs have used is nobody else's until it is given back.
        torch.cuda.empty_cache()
    return found


def read_layers(model: Any, ids: Tensor) -> Steps:
    """All layers, in order, as they stand: read in a forward of the model's, for the dtypes that it computes in."""
    steps: Steps = {}

    def read(layer: torch.nn.Module, given: Mapping[str, Any]) -> Tensor:
        steps[layer] = LayerStep(layer, given)
        hidden: Tensor = given["hidden_states"]
        return hidden

    for module in model.modules():
        kind = str(getattr(module, "rope_type", ""))
        if any(name in kind for name in BY_LENGTH):
            raise Refused(f"its rotary embedding is of the kind {kind}")
    one = torch.zeros((1, 1), dtype=torch.int64, device=ids.device)
    with substituting(read):
        _logits(model, one, one)
    wanted = getattr(model.config, "num_hidden_layers", None)
    if not steps or len(steps) != wanted:
        raise Refused(f"{len(steps)} of its {wanted} layers are patched")
    return steps


def _logits(model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [n, V] in fp32 of one token [n, 1] of each row, for layers that see no mask and no cache."""
    # One of four dimensions is taken by all masks as it is.
    mask = torch.ones((tokens.shape[0], 1, 1, 1), dtype=torch.bool, device=tokens.device)
    found = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
        return_dict=True,
    )
    return found.logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]  # upstream's


class _Decoding:
    """One call: the tensors that a step reads and writes, whose places a graph remembers."""

    def __init__(self, model: Any, steps: Steps, ids: Tensor, mask: Tensor, settings: Settings) -> None:
        self.model, self.steps, self.settings = model, steps, settings
        self.device = ids.device
        self.sampler = Sampler(settings, ids.shape[0], ids.device)
        self.out = torch.full(
            (ids.shape[0], settings.max_new_tokens), settings.padding, dtype=torch.int64, device=ids.device
        )
        self.step = torch.zeros(1, dtype=torch.int64, device=ids.device)
        # What a step has of each row that is not left out yet; `rows` are those rows' numbers.
        self.rows = torch.arange(ids.shape[0], device=ids.device)
        self.lengths = mask.sum(1)
        self.tokens = ids[:, -1:].clone()
        self.done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        self.seen: Tensor | None = None
        # Steps for which the cache has slots.
        self.room = min(ROOM, settings.max_new_tokens)
        self.cache = Cache(ids.shape[0], int(self.lengths.max()) + self.room)
        self._prefill(ids, mask)

    def _prefill(self, ids: Tensor, mask: Tensor) -> None:
        """Fill the cache and choose the first tokens. Rows of the same prompt are computed once."""
        numbers: dict[tuple[int, ...], int] = {}
        source = torch.tensor(
            [numbers.setdefault(tuple(row), len(numbers)) for row in torch.cat([ids, mask], 1).tolist()],
            device=self.device,
        )
        first = torch.zeros(len(numbers), dtype=torch.int64, device=self.device).scatter_(0, source, self.rows)
        found = self.model(
            input_ids=ids[first],
            attention_mask=mask[first],
            position_ids=(mask[first].cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        layers = getattr(found.past_key_values, "layers", ())
        if len(layers) != len(self.steps) or any(getattr(layer, "keys", None) is None for layer in layers):
            raise Refused("its cache is not one of keys and values of each layer")
        self.cache.fill(layers, self.lengths, source, [step.dtype for step in self.steps.values()])
        logits = found.logits[:, -1].float()[source]
        if self.settings.repetition_penalty != 1.0:
            # Padding is no token of a prompt.
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            row, column = mask.nonzero(as_tuple=True)
            self.seen[row, ids[row, column]] = True
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Choose a token of each row; those of rows that are done are padding."""
        is_reduced = len(self.rows) < len(self.out)
        chosen = self.sampler(logits, self.rows if is_reduced else None, self.step, self.seen)
        chosen = torch.where(self.done, self.settings.padding, chosen)
        self.out[self.rows, self.step.expand_as(self.rows)] = chosen
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        if self.settings.ends:
            self.done |= (chosen[:, None] == self.sampler.ends).any(1)
        self.tokens.copy_(chosen[:, None])
        self.step += 1

    def _advance(self) -> None:
        """One step of the rows that are here."""
        at = (torch.arange(len(self.rows), device=self.device), self.lengths)
        numbers = {layer: i for i, layer in enumerate(self.steps)}

        def run(layer: torch.nn.Module, given: Mapping[str, Any]) -> Tensor:
            i = numbers[layer]
            return self.steps[layer](given, self.cache.keys[i], self.cache.values[i], at)

        with substituting(run):
            logits = _logits(self.model, self.tokens, self.lengths[:, None])
        # A row that is done writes over its last slot, which nobody reads.
        self.lengths += ~self.done
        self._take(logits)

    def run(self) -> Tensor:
        """All new tokens [rows, made]."""
        left = self.settings.max_new_tokens - 1
        period = PERIOD if self.device.type == "cuda" else 1
        while left and self._reduce():
            if not self.room:
                self.room = min(ROOM, left)
                self.cache.grow(self.room)
            with _replaying(self, min(left, self.room)) as advance:
                size = len(self.rows)
                while left and self.room and self._waiting() * 2 > size:
                    for _ in range(min(period, left, self.room)):
                        advance()
                        left -= 1
                        self.room -= 1
        return self.out[:, : self._made()]

    def _waiting(self) -> int:
        """How many rows are not done; waits for the device."""
        return len(self.rows) - int(self.done.sum()) if self.settings.ends else len(self.rows)

    def _reduce(self) -> bool:
        """Leave out rows that are done, if they are half of them; whether there are others."""
        waiting = self._waiting()
        if waiting * 2 <= len(self.rows):
            left = (~self.done).nonzero()[:, 0]
            self.cache.keep(left)
            self.rows, self.lengths, self.tokens = self.rows[left], self.lengths[left], self.tokens[left]
            self.done = self.done[left]
            self.seen = None if self.seen is None else self.seen[left]
        return waiting > 0

    def _made(self) -> int:
        """How many tokens the longest row has, through its end."""
        steps = int(self.step)
        if not self.settings.ends or self._waiting():
            return steps
        ended = (self.out[:, :steps, None] == self.sampler.ends).any(-1)
        return int(ended.int().argmax(1).max()) + 1


@contextmanager
def _replaying(decoding: _Decoding, left: int) -> Iterator[Any]:
    """How to do `left` steps or less with the rows that there are: the first as it is, then by a graph of it."""
    graph: torch.cuda.CUDAGraph | None = None
    count = 0

    def advance() -> None:
        nonlocal graph, count
        count += 1
        # The first has compiled its kernels and chosen its products' algorithms, which nobody may do in a graph.
        if count == 2 and decoding.device.type == "cuda" and left > WORTH:
            graph = captured(decoding._advance, decoding.device)
        if graph is None:
            decoding._advance()
        else:
            graph.replay()

    try:
        yield advance
    finally:
        if graph is not None:
            torch.cuda.synchronize(decoding.device)
            graph.reset()
