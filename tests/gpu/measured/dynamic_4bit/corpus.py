"""Text, tokenizer and splits: Python source and documentation to train on, C and C++ headers to fine-tune on.

Read are the standard library and all folders of the module path. Files of equal content count once; a held-out file
most of whose lines stand in training files too (a vendored copy, say) is dropped.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from .common import Work, parser, record, timed

CODE = (".py", ".rst", ".md")
OTHER = (".h", ".hpp", ".cuh", ".c", ".cpp", ".cc")
SMALLEST, LARGEST = 500, 300_000  # bytes of a file: beyond are stubs, and tables that a program wrote
END = "<|end|>"


def folders() -> list[str]:
    """Where Python's own modules and installed ones lie, but for this project's, whose text changes all the time."""
    own = {os.path.realpath(folder) for folder in (Path(__file__).parents[1], Path(__file__).parents[4])}
    found = {os.path.realpath(path) for path in [sysconfig.get_path("stdlib"), *sys.path] if os.path.isdir(path)}
    return sorted(found - own - {"/"})


def texts(suffixes: tuple[str, ...], limit: int) -> list[str]:
    """Files of different content in an order that is drawn once, up to `limit` bytes."""
    paths = set()
    for folder in folders():
        for parent, below, files in os.walk(folder):
            below[:] = [name for name in below if not name.startswith((".", "__pycache__", "sloth_plugins"))]
            paths.update(os.path.join(parent, name) for name in files if name.endswith(suffixes))
    order = sorted(paths)
    random.Random(0).shuffle(order)
    seen, found, size = set(), [], 0
    for path in order:
        try:
            if not SMALLEST < os.path.getsize(path) < LARGEST:
                continue
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # one file of very many
        digest = hashlib.sha256("".join(text.split()).encode()).digest()
        if digest not in seen and END not in text:
            seen.add(digest)
            found.append(text)
            size += len(text)
        if size > limit:
            break
    return found


def split(found: list[str], *sizes: int) -> list[list[str]]:
    """Whole files, so many bytes of each, and all the rest; the parts know of no line that most of the rest has."""
    parts: list[list[str]] = []
    at = 0
    for size in sizes:
        begin, read = at, 0
        while read < size and at < len(found):
            read += len(found[at])
            at += 1
        parts.append(found[begin:at])
    rest = found[at:]
    known = {hash(line) for text in rest for line in long_lines(text)}
    parts = [[text for text in part if is_new(text, known)] for part in parts]
    return [*parts, rest]


def long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) > 24]


def is_new(text: str, known: set[int]) -> bool:
    lines = long_lines(text)
    return bool(lines) and sum(hash(line) in known for line in lines) < 0.5 * len(lines)


def tokenizer(sample: list[str], vocabulary: int) -> Any:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def encoded(made: Any, part: list[str]) -> np.ndarray:
    end = made.eos_token_id
    core = made.backend_tokenizer
    pieces = []
    for begin in range(0, len(part), 2000):
        pieces += [np.array([*one.ids, end], np.uint16) for one in core.encode_batch_fast(part[begin : begin + 2000])]
    return np.concatenate(pieces)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--megabytes", type=float, default=120, help="of text to train on, at most")
    options.add_argument("--tune-megabytes", type=float, default=15, help="of headers to fine-tune on, at most")
    options.add_argument("--held-out-megabytes", type=float, default=3)
    options.add_argument("--vocabulary", type=int, default=8192)
    given = options.parse_args()
    work = Work(given.work)
    given.work.mkdir(parents=True, exist_ok=True)
    aside = int(given.held_out_megabytes * 1e6)
    with timed(given.results, "reading"):
        held_out, calibration, train = split(texts(CODE, int(given.megabytes * 1e6)), aside, aside)
        tune_held_out, tune = split(texts(OTHER, int(given.tune_megabytes * 1e6)), aside // 2)
    if not (held_out and calibration and train and tune_held_out and tune):
        raise SystemExit(f"too little text in {', '.join(folders())}")
    with timed(given.results, "tokenizer"):
        made = tokenizer(train[: max(1, len(train) // 10)], given.vocabulary)
        made.save_pretrained(work.tokenizer)
    work.calibration.write_text("\n".join(calibration), encoding="utf-8")
    parts = {"train": train, "held_out": held_out, "tune": tune, "tune_held_out": tune_held_out}
    with timed(given.results, "encoding"):
        for name, part in parts.items():
            ids = encoded(made, part)
            np.save(given.work / f"{name}.npy", ids)
            size = sum(len(text.encode()) for text in part)
            record(given.results, "corpus", split=name, files=len(part), bytes=size, tokens=len(ids))


if __name__ == "__main__":
    main()
