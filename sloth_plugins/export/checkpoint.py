"""The tensors of a full checkpoint's folder, read from its safetensors files one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import SlothError
from .naming import tied_by_config, untie
from .quantised import Packed, packed_names, shapes_without_parts

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROWS = 4096


class Checkpoint:
    """A folder with config.json and safetensors weights, sharded or not; bitsandbytes weights are dequantised."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self.name = str(folder)
        self.generation_config: Any = None
        self.config = read_config(folder)
        self.quantization = take_quantization(self.config, folder)
        self._files = _weight_map(folder)
        headers = {file: _shapes(file) for file in dict.fromkeys(self._files.values())}
        self._stored = {name: headers[file][name] for name, file in self._files.items()}
        self._packed = {name: Packed.read(parts, self._raw) for name, parts in packed_names(self._stored).items()}
        self.quantised = frozenset(self._packed)
        self.tied = self._tied()
        """The head's name with the embedding's, where the config ties them."""

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return list(dict.fromkeys(self._files.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name in the files' order with its shape, dequantised."""
        shapes = shapes_without_parts(self._stored, self._packed)
        return {name: shape for name, shape in shapes.items() if name not in self.tied}

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU: fp32 where it was quantised, else in its stored dtype."""
        packed = self._packed.get(name)
        return self._raw(name) if packed is None else packed.dequantise(self._raw)

    def _tied(self) -> dict[str, str]:
        """As transformers has it: a head that is stored, and is another matrix than the embedding, stays."""
        for head, embedding in tied_by_config(self.config).items():
            if head in self._stored and embedding in self._stored and not self._same(head, embedding):
                untie(self.config)
            elif embedding in self._stored:
                return {head: embedding}
        return {}

    def _same(self, left: str, right: str) -> bool:
        """Whether two tensors hold the same values, with no more than some rows of them in memory."""
        if self._stored[left] != self._stored[right]:
            return False
        with opened(self._files[left]) as one, opened(self._files[right]) as other:
            a, b = one.get_slice(left), other.get_slice(right)
            parts = [slice(start, start + ROWS) for start in range(0, self._stored[left][0], ROWS)]
            return all(torch.equal(a[part].float(), b[part].float()) for part in parts)

    def _raw(self, name: str) -> torch.Tensor:
        # Opened for each tensor: the file is mapped, and what was read of it counts as ours until it is closed.
        with opened(self._files[name]) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
            return tensor.clone()


def read_config(folder: Path) -> Any:
    """The folder's model configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - upstream reads and validates configs with many kinds of exception
        raise SlothError(f"{folder / 'config.json'} cannot be read: {line(error)}") from None


def take_quantization(config: Any, where: object) -> dict[str, Any] | None:
    """Remove the quantisation from a config and give it back; only bitsandbytes is known."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values: dict[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method != "bitsandbytes":
        raise SlothError(
            f"{where} is quantised by {method}; bitsandbytes (4-bit, 8-bit) can be taken back, "
            "for others name the 16-bit model as the base"
        )
    del config.quantization_config
    if hasattr(config, "_pre_quantization_dtype"):
        del config._pre_quantization_dtype  # goes with it: transformers 4 cannot write it alone
    return values


def _weight_map(folder: Path) -> dict[str, Path]:
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_shapes(folder / SINGLE), folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise SlothError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be read")
    try:
        names: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlothError(f"{folder / INDEX} cannot be read: {line(error)}; download it again") from None
    missing = sorted({file for file in names.values() if not (folder / file).is_file()})
    if missing:
        raise SlothError(f"{folder} lacks {', '.join(missing)} of its index; the download was not finished")
    files = {name: folder / file for name, file in names.items()}
    for file in dict.fromkeys(files.values()):
        absent = sorted({name for name, home in files.items() if home == file} - set(_shapes(file)))
        if absent:
            raise SlothError(f"{file} lacks {absent[0]}, which {INDEX} places there; download it again")
    return files


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with opened(file) as shard:
        names: list[str] = shard.keys()
        return {name: tuple(shard.get_slice(name).get_shape()) for name in names}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; the library itself checks that the header's extent is the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # whose errors say why, where safetensors' say that there is no such file
        with safe_open(file, framework="pt", device="cpu") as shard:
            yield shard
    except OSError as error:
        raise cannot_read(file, error) from None
    except SafetensorError as error:
        raise SlothError(f"{file} is damaged or was not downloaded whole ({line(error)}); fetch it again") from None


def cannot_read(path: Path, error: OSError) -> SlothError:
    """The operating system's refusal, in one line."""
    return SlothError(f"cannot read {path}: {error.strerror or line(error)}")


def line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:200]
