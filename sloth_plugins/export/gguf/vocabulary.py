"""The tokens of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from ...errors import SlothError


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as llama.cpp's header numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(slots=True)
class Vocabulary:
    """Tokens by id. `model` is `tokenizer.ggml.model`: gpt2, with merges, or llama, with scores."""

    model: str
    texts: list[str | None] = field(default_factory=list)
    types: list[TokenType] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] | None = None
    pre: str = "default"
    add_space_prefix: bool | None = None
    unknown: str | None = None
    notes: list[str] = field(default_factory=list)

    def put(self, id: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Set one token; ids between the last one and this are unused until they are set too."""
        while len(self.texts) <= id:
            self.texts.append(None)
            self.types.append(TokenType.UNUSED)
            self.scores.append(0.0)
        self.texts[id], self.types[id], self.scores[id] = text, kind, score

    def fill(self, rows: int) -> None:
        """Give every row of the embedding a token. Raises SlothError where there are more tokens than rows."""
        if len(self.texts) > rows:
            raise SlothError(
                f"the tokenizer has {len(self.texts)} tokens and the model's embedding {rows} rows; "
                "is it this model's tokenizer?"
            )
        taken = set(self.texts)
        if len(taken - {None}) < len(self.texts) - self.texts.count(None):
            twice = next(text for text in self.texts if text is not None and self.texts.count(text) > 1)
            raise SlothError(f"the tokenizer has two tokens {twice!r}; llama.cpp needs them to differ")
        for id in range(rows):
            if id >= len(self.texts) or self.texts[id] is None:
                text = f"[PAD{id}]"
                while text in taken:
                    text = f"[{text}]"
                taken.add(text)
                self.put(id, text, TokenType.UNUSED)
