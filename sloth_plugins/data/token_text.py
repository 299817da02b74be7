"""The text of tokens byte by byte, so that every token has its place in it, also where one cuts a character in two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def as_bytes(text: str) -> str:
    """A text as its UTF-8, one character for each byte."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


class TokenText:
    """Turns ids into text. Knows byte-level vocabularies and SentencePiece's, which are those that chat models have."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._pieces = {id: as_bytes(str(token)) for id, token in tokenizer.added_tokens_decoder.items()}
        self.special = list(self._pieces.values())
        core = getattr(tokenizer, "backend_tokenizer", None)
        decoder = None if core is None else core.decoder
        self._bytes = _byte_alphabet() if decoder is not None and b"ByteLevel" in decoder.__getstate__() else None

    def __reduce__(self) -> tuple[Any, ...]:
        # `datasets` caches by what a function holds, which must not change with the tokens that were read so far.
        return TokenText, (self.tokenizer,)

    def piece(self, id: int) -> str:
        """One token's bytes."""
        if id not in self._pieces:
            token = self.tokenizer.convert_ids_to_tokens(id) or ""
            if self._bytes is not None and all(letter in self._bytes for letter in token):
                self._pieces[id] = "".join(self._bytes[letter] for letter in token)
            else:
                byte = _BYTE.fullmatch(token)
                self._pieces[id] = chr(int(byte[1], 16)) if byte else as_bytes(token.replace("▁", " "))
        return self._pieces[id]

    def read(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text, and where in it each token ends."""
        pieces = [self.piece(id) for id in ids]
        return "".join(pieces), list(accumulate(map(len, pieces)))

    def again(self, text: str) -> str:
        """A text after it went through the tokenizer, which may put spaces where there were none."""
        return self.read(self.tokenizer(text, add_special_tokens=False)["input_ids"])[0]


def _byte_alphabet() -> dict[str, str]:
    """GPT-2's letters for bytes: what can be seen of Latin-1 stands for itself, the rest are letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(seen))
    return {chr(byte): chr(byte) for byte in seen} | {chr(0x100 + n): chr(byte) for n, byte in enumerate(others)}
