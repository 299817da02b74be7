"""From logits to tokens, as transformers' logits processors are defined."""

import torch

from .settings import Settings

Tensor = torch.Tensor


class Sampler:
    """Chooses a token for each row; `settings` are those of the call, `rows` how many rows it began with.

    Without a sync with the host, and with the same numbers for a row whoever else is still there, so that a step can be
    captured, and rows that are done can be left out. On a CPU those numbers are torch.multinomial's.
    """

    def __init__(self, settings: Settings, rows: int, device: torch.device) -> None:
        self.settings = settings
        self.rows = rows
        self.ends = torch.tensor(settings.ends, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, rows: Tensor | None, step: Tensor, seen: Tensor | None) -> Tensor:
        """Tokens [n] for logits [n, V] in fp32, which may be overwritten.

        `rows` [n] are the rows' numbers, None for all; `step` [1] counts the tokens that were made before; `seen`
        [n, V] says of which tokens there has been one, and is None without a repetition penalty.
        """
        chosen = self.settings
        if seen is not None:
            penalty = chosen.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if chosen.min_new_tokens and chosen.ends:
            ended = logits.index_fill(1, self.ends, -torch.inf)
            logits = torch.where(step < chosen.min_new_tokens, ended, logits)
        if not chosen.samples:
            return logits.argmax(-1)
        probabilities = torch.softmax(_warped(logits, chosen), dim=-1)
        noise = torch.empty((self.rows, logits.shape[1]), dtype=torch.float32, device=logits.device).exponential_()
        if rows is not None:
            noise = noise.index_select(0, rows)
        # The least of exponential variables with these rates, and it is the first with its probability.
        return (probabilities / noise).argmax(-1)


def _warped(logits: Tensor, chosen: Settings) -> Tensor:
    if chosen.temperature != 1.0:
        logits = logits / chosen.temperature
    if chosen.top_k:
        least = torch.topk(logits, min(chosen.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if chosen.top_p < 1.0:
        ascending, order = torch.sort(logits)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - chosen.top_p
        removed[:, -1] = False
        logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    if chosen.min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < chosen.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits
