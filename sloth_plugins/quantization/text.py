"""Rows of tokens to calibrate on: from a text file, or from the documentation and source of Python itself."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import SlothError, nearest

BUILTIN = "builtin"
# Few texts take more bytes for a token; what is read of a longer file is spread over all of it.
BYTES_PER_TOKEN = 12
EDGE = 4  # bytes of one character, at most


def calibration_rows(tokenizer: Any, data: str | Path, samples: int, length: int) -> torch.Tensor:
    """`samples` rows of `length` token ids, int64 [samples, length], evenly spread over the text of `data`.

    `data` is a UTF-8 text file, or "builtin". Raises SlothError where it is no text, or has too little.
    """
    if samples < 1 or length < 2:
        raise SlothError(f"{samples} samples of {length} tokens are nothing to calibrate on; 64 of 512 are usual")
    wanted = samples * length
    builtin = str(data) == BUILTIN and not Path(data).exists()
    pieces = _builtin(wanted * BYTES_PER_TOKEN) if builtin else _pieces(Path(data), wanted * BYTES_PER_TOKEN, samples)
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < wanted:
        name = "Python's own text" if builtin else str(data)
        fewer = len(ids) // length
        advice = f"give more text, or --samples {fewer}" if fewer else "give more text"
        raise SlothError(f"{name} has {len(ids)} tokens, {samples} samples of {length} take {wanted}; {advice}")
    tokens = torch.tensor(ids)
    starts = torch.linspace(0, len(ids) - length, samples).long()
    # Neighbours that overlap would count twice what they share.
    starts = starts if samples == 1 or int(starts.diff().min()) >= length else torch.arange(samples) * length
    return tokens[starts[:, None] + torch.arange(length)]


def _pieces(file: Path, limit: int, parts: int) -> list[str]:
    """The file's text, or `parts` pieces of it of `limit` bytes together."""
    try:
        size = file.stat().st_size if file.is_file() else -1
        if size < 0:
            siblings = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
            raise SlothError(f"{file} is no file{nearest(file.name, siblings)}; --data takes a text file, or {BUILTIN}")
        with file.open("rb") as opened:
            if size <= limit:
                raw = [opened.read()]
            else:
                raw = []
                for part in range(parts):
                    opened.seek((size - limit // parts) * part // max(1, parts - 1))
                    raw.append(opened.read(limit // parts))
    except OSError as error:
        raise SlothError(f"cannot read {file}: {error.strerror}") from None
    pieces = [_decoded(file, piece, whole=size <= limit) for piece in raw]
    if not any(piece.strip() for piece in pieces):
        raise SlothError(f"{file} is empty; --data takes a text file, or {BUILTIN}")
    return pieces


def _decoded(file: Path, raw: bytes, *, whole: bool) -> str:
    """UTF-8; a piece may begin and end within a character."""
    ends = [(0, 0)] if whole else [(head, tail) for head in range(EDGE) for tail in range(EDGE)]
    for head, tail in ends:
        try:
            text = raw[head : len(raw) - tail].decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise SlothError(f"{file} is no UTF-8 text; --data takes a text file, or {BUILTIN}")


def _builtin(limit: int) -> Iterator[str]:
    """Modules of the standard library in a fixed order, in turn their documentation and their source."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    files += sorted(folder.glob("[a-z]*/__init__.py"))
    read = 0
    for index, file in enumerate(files[1::2] + files[::2]):
        try:
            source = file.read_text(encoding="utf-8")
            text = _documentation(source) if index % 2 else source
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue  # one file of many, not the user's
        yield text
        read += len(text)
        if read >= limit:
            return


def _documentation(source: str) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)
