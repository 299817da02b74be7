"""From a model to GGUF files and a Modelfile: checked first, written beside, renamed when they are whole."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import SlothError
from ..ollama import MODELFILE, generation_of, write_modelfile
from ..sources import tokenizer_folder
from ..weights import open_weights
from ..writing import FULL, check_space
from .llama_cpp import check_tokens, quantize, require_quantizer
from .methods import MADE, WRITTEN, base_method, parse_methods
from .probe import PROBE
from .writing import Source, read_source, write


@dataclass(slots=True)
class Exported:
    """The files that were written, and a line for each thing that llama.cpp does otherwise than transformers."""

    files: list[Path]
    modelfile: Path | None = None
    notes: list[str] = field(default_factory=list)


def export(
    source: Any,
    out_dir: str | Path,
    tokenizer: Any = None,
    methods: str | Iterable[str] = "q8_0",
    *,
    base: str | Path | None = None,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    modelfile: bool = True,
    force: bool = False,
) -> Exported:
    """Write `out_dir`/model-METHOD.gguf for each method, and a Modelfile for the first of them.

    `source` is a merged folder, an adapter's (with `base` where its base has moved), or a live model, which needs its
    `tokenizer`. The model is converted once; K-quants are made of that by llama.cpp. `name` goes into the file, and
    defaults to the folder's. `pre_tokenizer` is llama.cpp's name of one, where a tokenizer's own is unknown to it.
    Raises SlothError for whatever llama.cpp could not run, for files that exist unless `force`, and where the disk is
    full; nothing is then left under a final name that is not whole.
    """
    _require_gguf()
    out = Path(out_dir)
    wanted = parse_methods(methods)
    files = {method: out / f"model-{method}.gguf" for method in wanted}
    _refuse_existing([*files.values(), *([out / MODELFILE] if modelfile else [])], force)
    for method in wanted:
        if method in MADE:
            require_quantizer(method)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(tokenizer or _tokenizer_folder(source, base))
    name = name or (Path(source) if isinstance(source, str | Path) else out).resolve().name
    described = read_source(open_weights(source, base), tokenizer, name, pre_tokenizer)
    with _one_line(out):
        check_space(out, _bytes_needed(described, wanted))
        out.mkdir(parents=True, exist_ok=True)
        checked = _write_all(described, files)
        result = Exported(list(files.values()), notes=described.notes)
        if modelfile:
            path = out / MODELFILE
            asked = generation_of(source, base)
            result.notes += write_modelfile(path, files[wanted[0]], tokenizer, described.tokens.add_bos, asked)
            result.modelfile = path
    if not checked:
        result.notes.append("llama.cpp is not here, so its tokens were not compared with the tokenizer's")
    return result


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any,
    quantization_method: str | Iterable[str] = "q8_0",
    **options: Any,
) -> Exported:
    """`export` of a live model, in the order of arguments of `save_pretrained`."""
    return export(model, save_directory, tokenizer, quantization_method, **options)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SlothError("GGUF export needs the gguf package: pip install 'sloth-plugins[gguf]'")


def _refuse_existing(paths: Iterable[Path], force: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise SlothError(f"{', '.join(there)} exists already; name another folder, or add --force (force=True)")


def _tokenizer_folder(source: Any, base: str | Path | None) -> Path:
    folder = tokenizer_folder(source, base) if isinstance(source, str | Path) else None
    if folder is None:
        raise SlothError("no tokenizer was found; a GGUF file holds one: give tokenizer=, or save it beside the model")
    return folder


def _load_tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    files = [name for name in ("tokenizer.json", "tokenizer.model") if (Path(folder) / name).is_file()]
    if files == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None:
        raise SlothError(f"{folder}/tokenizer.model is read by sentencepiece: pip install 'sloth-plugins[gguf]'")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - a tokenizer's files may be damaged in any way
        raise SlothError(f"the tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())}") from None


def _bytes_needed(source: Source, methods: list[str]) -> int:
    """K-quants are counted as half of the file that they are made of, which is more than the usual ones take."""
    base = base_method(source.weights.config, methods)
    made = sum(method in MADE for method in methods)
    need = sum(source.bytes(method) for method in methods if method in WRITTEN) + made * source.bytes(base) // 2
    return need + (source.bytes(base) if made and base not in methods else 0)


def _write_all(source: Source, files: dict[str, Path]) -> bool:
    """Write every file; returns whether llama.cpp was here to compare tokens with."""
    made = [method for method in files if method in MADE]
    base = base_method(source.weights.config, files) if made else None
    checked = None
    for method in dict.fromkeys([*([base] if base else []), *(method for method in files if method in WRITTEN)]):
        final = files.get(method)
        with _beside(
            final or next(iter(files.values())).with_name(f"model-{method}.gguf"), keep=final is not None
        ) as path:
            write(source, path, method)
            if checked is None:
                checked = check_tokens(path, source.tokenizer, PROBE, source.tokens.before_probe)
            for other in made if method == base else ():
                with _beside(files[other]) as target:
                    quantize(path, target, other)
    return bool(checked)


@contextmanager
def _beside(final: Path, *, keep: bool = True) -> Iterator[Path]:
    """A path beside `final` that becomes it when all went well, and is removed otherwise."""
    path = final.with_name(f".{final.name}.partial")
    try:
        yield path
        if keep:
            os.replace(path, final)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # numpy says how much it could write, and not why that was less.
        full = error.errno in FULL or "requested and" in str(error)
        reason = "the disk is full" if full else error.strerror or error
        raise SlothError(f"cannot write {out}: {reason}; nothing half-written is left") from None
