"""From a model to GGUF files and a Modelfile: checked first, written beside, renamed when they are whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...beside import beside
from ...errors import SlothError
from ..ollama import MODELFILE, generation_of, write_modelfile
from ..sources import tokenizer_folder
from ..tokenizers import require_same_rows
from ..weights import open_weights
from ..writing import check_space
from .llama_cpp import can_tokenize, check_tokens, quantize, require_quantizer
from .methods import MADE, WRITTEN, base_method, parse_methods
from .output import locked, refuse_existing, telling
from .pre_tokenizers import require_known
from .probe import PROBE
from .writing import Source, read_source, write

if TYPE_CHECKING:
    from ..changes import Merged


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
    methods: str | Iterable[str] | None = "q8_0",
    *,
    base: str | Path | None = None,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    modelfile: bool = True,
    force: bool = False,
) -> Exported:
    """Write `out_dir`/model-METHOD.gguf for each method (None is q8_0), and a Modelfile for the first of them.

    `source` is a merged folder, an adapter's (with `base` where its base has moved), or a live model, which needs its
    `tokenizer`. The model is converted once; K-quants are made of that by llama.cpp. `name` goes into the file, and
    defaults to the folder's. `pre_tokenizer` is llama.cpp's name of one, where a tokenizer's own is unknown to it.
    A Modelfile that is there is kept, which a note says, unless `force`. Raises SlothError for whatever llama.cpp could
    not run, for files that exist unless `force`, and where the disk is full; nothing is then left under a final name
    that is not whole.
    """
    _require_gguf()
    out = Path(out_dir)
    wanted = parse_methods(methods)
    files = {method: out / f"model-{method}.gguf" for method in wanted}
    refuse_existing(files.values(), force)
    for method in wanted:
        if method in MADE:
            require_quantizer(method)
    if pre_tokenizer is not None and not can_tokenize():
        require_known(pre_tokenizer)
    weights = open_weights(source, base)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(tokenizer or _tokenizer_folder(source, base, weights))
    asked = generation_of(source, base)
    name = name or (Path(source) if isinstance(source, str | Path) else out).resolve().name
    described = read_source(weights, tokenizer, name, pre_tokenizer)
    result = Exported(list(files.values()), notes=described.notes)
    with telling(out):
        check_space(out, _bytes_needed(described, wanted))
        with locked(out):
            refuse_existing(files.values(), force)  # another process may have been quicker
            checked = _write_all(described, files)
            path = out / MODELFILE
            if modelfile and path.exists() and not force:
                result.notes.append(f"{path} is kept as it was; name {files[wanted[0]].name} in its FROM, or remove it")
            elif modelfile:
                result.notes += write_modelfile(path, files[wanted[0]], tokenizer, described.tokens.add_bos, asked)
                result.modelfile = path
    if not checked:
        result.notes.append("llama.cpp is not here, so its tokens were not compared with the tokenizer's")
    return result


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any,
    quantization_method: str | Iterable[str] | None = "q8_0",
    **options: Any,
) -> Exported:
    """`export` of a live model, in the order of arguments of `save_pretrained`."""
    return export(model, save_directory, tokenizer, quantization_method, **options)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SlothError("GGUF export needs the gguf package: pip install 'sloth-plugins[gguf]'")


def _tokenizer_folder(source: Any, base: str | Path | None, weights: Merged) -> Path:
    if not isinstance(source, str | Path):
        raise SlothError("no tokenizer was given with the model; a GGUF file holds one: add tokenizer=")
    folder = tokenizer_folder(source, base)
    if folder is None:
        raise SlothError(f"no tokenizer was found, and a GGUF file holds one; save it in {source}")
    require_same_rows(folder, weights.base.folder, weights)
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
        with beside(
            final or next(iter(files.values())).with_name(f"model-{method}.gguf"), keep=final is not None
        ) as path:
            write(source, path, method)
            if checked is None:
                checked = check_tokens(path, source.tokenizer, PROBE, source.tokens.before_probe)
            for other in made if method == base else ():
                with beside(files[other]) as target:
                    quantize(path, target, other)
    return bool(checked)
