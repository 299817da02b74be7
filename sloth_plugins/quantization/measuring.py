"""What is known of a model's linear layers once it is calibrated, kept in a cache by all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..beside import beside
from ..errors import SlothError, check_known
from ..export.formats import dtype_of
from ..export.progress import progress
from ..export.sources import cached, model_folder, tokenizer_folder
from ..export.weights import Weights, open_weights
from .calibration import SEED, Work, calibrate, layer_statistics
from .packing import Packing
from .statistics import SCORES
from .streaming import Streamed
from .text import BUILTIN, calibration_rows
from .truth import single_module_kl

TRUTH = "kl"
NAMES = (*(score.name for score in SCORES), TRUTH)
SAMPLES, LENGTH = 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A linear layer with its scores by name, its bytes either way, and its largest input.

    `ratio` is that input's magnitude over the median channel's root mean square, `channel` where it occurs.
    """

    name: str
    weight: str
    layer: int
    rows: int
    columns: int
    scores: dict[str, float]
    plain_bytes: int
    packed_bytes: int
    largest: float
    channel: int
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A model's linear layers as measured, and what the rest of it takes."""

    linears: list[Measured]
    outside: list[str]
    """Linear layers that no decoder layer has, which stay in 16 bits."""
    other_bytes: int
    """All tensors but the linear layers' weights, in 16 bits."""
    tokens: int
    inputs: Path
    """The mean squares of each linear's inputs, fp32 [columns] by its path: a safetensors file."""

    @property
    def all_four_bit(self) -> int:
        """Bytes of the checkpoint with every linear layer in 4 bits."""
        return self.other_bytes + sum(linear.packed_bytes for linear in self.linears)

    @property
    def all_plain(self) -> int:
        """Bytes of the checkpoint in 16 bits."""
        return self.other_bytes + sum(linear.plain_bytes for linear in self.linears)


def measure(
    source: str | Path,
    *,
    data: str | Path = BUILTIN,
    samples: int = SAMPLES,
    length: int = LENGTH,
    score: str = "fisher",
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    cache: str | Path | None = None,
) -> Measurement:
    """Calibrate the model in `source`, a folder or a model in the Hub's cache, unless the cache has it already.

    `data` is a text file or "builtin", of which `samples` rows of `length` tokens are read; `score` "kl" measures each
    linear layer's own divergence as well, which takes many times as long. All of it runs on `device` ("cpu", "cuda"),
    one decoder layer at a time. Partial results stay in the cache, so that an interrupted run goes on where it stopped.
    Raises SlothError for what the user must act on.
    """
    check_known("score", score, NAMES)
    place = torch_device(device)
    folder = source_folder(source)
    rows = rows_of(folder, data, samples, length)
    weights = open_weights(folder)
    if weights.base.quantised:
        raise SlothError(f"{folder} is quantised already; name the 16-bit model that it was made of")
    packing = Packing(dtype=dtype_of(dtype, weights.config))
    inputs = _inputs(folder, rows, packing, place)
    work = Work(cache_folder(cache) / inputs)
    work.folder.mkdir(parents=True, exist_ok=True)
    # Of processes that load the same model side by side one measures, and the others wait for it.
    with work.alone():
        return _measure(weights, rows, packing, place, score, work)


def _measure(
    weights: Weights, rows: torch.Tensor, packing: Packing, place: torch.device, score: str, work: Work
) -> Measurement:
    found = _read(work)
    if found is not None and (score != TRUTH or TRUTH in found.linears[0].scores):
        return found
    streamed = streamed_of(weights, packing, place)
    once = streamed.bytes
    if found is None:
        with progress("calibrating", 2 * once) as advance:
            calibrate(streamed, rows, packing, work, advance)
        found = _collect(streamed, packing, rows, work)
    if score == TRUTH:
        with progress("measuring each layer", once) as advance:
            truth = single_module_kl(streamed, rows, packing, work, advance)
        found = _with_truth(found, truth)
    _write(found, work)
    return found


def source_folder(source: str | Path) -> Path:
    """The folder of a model that is named by it, or by its name in the Hub's cache."""
    name = str(source)
    in_the_hub = name.count("/") == 1 and not name.startswith(".") and not Path(name).exists()
    return cached(name) if in_the_hub else model_folder(Path(source))


def torch_device(name: str | None) -> torch.device:
    """The device of that name; the GPU where there is one and none is named. Raises SlothError for one that is not."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_known("device", name.partition(":")[0], ("cpu", "cuda"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SlothError(f"device {name}: torch {torch.__version__} sees no GPU here; use cpu")
    return torch.device(name)


def cache_folder(given: str | Path | None = None) -> Path:
    """Where measurements are kept: the folder given, or `sloth-plugins/quantization` in the user's cache."""
    if given is not None:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sloth-plugins" / "quantization"


def rows_of(folder: Path, data: str | Path, samples: int, length: int) -> torch.Tensor:
    """Ids [samples, length] of calibration text, by the tokenizer of the model in `folder`."""
    from transformers import AutoTokenizer

    place = tokenizer_folder(folder)
    if place is None:
        raise SlothError(f"{folder} holds no tokenizer, by which calibration text is read; save it there")
    return calibration_rows(AutoTokenizer.from_pretrained(place), data, samples, length)


def streamed_of(weights: Any, packing: Packing, device: torch.device) -> Streamed:
    """The model of `weights`, computing in their dtype, but for fp16, whose range gradients leave."""
    return Streamed(weights, device, _compute_dtype(weights, packing, device))


def _compute_dtype(weights: Any, packing: Packing, device: torch.device) -> torch.dtype:
    stored = getattr(weights.config, "dtype", None)
    if stored == torch.float32 or packing.dtype == torch.float32:
        return torch.float32
    return torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float32


def _inputs(folder: Path, rows: torch.Tensor, packing: Packing, device: torch.device) -> str:
    """A name for all that decides what is measured."""
    files = sorted(path for path in folder.resolve().glob("*") if path.suffix in (".safetensors", ".json"))
    read = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    facts = json.dumps([read, str(packing), device.type, SEED, __version__, list(rows.shape)], sort_keys=True)
    return hashlib.sha256(facts.encode() + rows.numpy().tobytes()).hexdigest()[:24]


def _collect(streamed: Streamed, packing: Packing, rows: torch.Tensor, work: Work) -> Measurement:
    """One measurement of all layers' files, which are then not needed."""
    linears: list[Measured] = []
    squares: dict[str, torch.Tensor] = {}
    for index, row in enumerate(streamed.linears):
        facts, tensors = layer_statistics(work, index)
        squares |= tensors
        for linear in row:
            linears.append(Measured(**asdict(linear), **facts[linear.name]))
    work.write("inputs", squares)
    weights = {linear.weight for linear in linears}
    others = sum(torch.Size(shape).numel() for name, shape in streamed.weights.shapes().items() if name not in weights)
    return Measurement(
        linears=linears,
        outside=streamed.outside,
        other_bytes=others * packing.dtype.itemsize,
        tokens=rows.numel(),
        inputs=work.folder / "inputs.safetensors",
    )


def _with_truth(found: Measurement, truth: Mapping[str, float]) -> Measurement:
    for linear in found.linears:
        linear.scores[TRUTH] = truth[linear.name]
    return found


def _write(found: Measurement, work: Work) -> None:
    """The measurement under its name, and nothing else beside the inputs."""
    values = asdict(found) | {"inputs": None}
    with beside(work.folder / "measured.json") as partial:
        partial.write_text(json.dumps(values), encoding="utf-8")
    for path in work.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("measured.json", "inputs.safetensors"):
            path.unlink()


def _read(work: Work) -> Measurement | None:
    try:
        values = json.loads((work.folder / "measured.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    linears = [Measured(**linear) for linear in values.pop("linears")]
    return Measurement(linears=linears, **values | {"inputs": work.folder / "inputs.safetensors"})
