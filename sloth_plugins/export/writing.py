"""A folder that appears whole under its name or not at all: written beside it, continued after an interruption."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SlothError
from .checkpoint import line, opened

if TYPE_CHECKING:
    import torch

INPUTS = "inputs.json"
MODELS = ("config.json", "adapter_config.json")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staged:
    """`final`.partial, beside the final name and in its file system, which `finish` renames.

    `inputs` says what the files are made of; complete ones are kept for the next run of the same inputs. None keeps
    nothing.
    """

    def __init__(self, final: Path, inputs: dict[str, object] | None) -> None:
        self.final = final
        self.folder = final.with_name(f"{final.name}.partial")
        self._inputs = inputs

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The folder, which gets its final name at the end; on an error complete shards stay for the next run."""
        from filelock import FileLock, Timeout

        with telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                raise SlothError(f"{self.folder} is being written by another process") from None
            try:
                self._forget_other_inputs()
                yield self.folder
                (self.folder / INPUTS).unlink(missing_ok=True)
            except BaseException:
                self._keep_what_is_complete()
                raise
            finally:
                lock.release()
                (self.folder / ".lock").unlink(missing_ok=True)
                if self.folder.is_dir() and not any(self.folder.iterdir()):
                    self.folder.rmdir()
            self._rename()

    def _forget_other_inputs(self) -> None:
        record = self.folder / INPUTS
        text = json.dumps(self._inputs, indent=1, sort_keys=True)
        known = record.read_text(encoding="utf-8") if record.is_file() else None
        for path in self.folder.iterdir():
            if path.name != ".lock" and (known != text or path.suffix != ".safetensors"):
                _remove(path)
        if self._inputs is not None:
            record.write_text(text, encoding="utf-8")

    def _keep_what_is_complete(self) -> None:
        shards = list(self.folder.glob("*.safetensors")) if self._inputs is not None else []
        for path in self.folder.iterdir():
            if path.name != ".lock" and path not in shards and not (shards and path.name == INPUTS):
                _remove(path)

    def _rename(self) -> None:
        if not self.final.exists():
            self.folder.rename(self.final)
            return
        # The old export goes only when the new one is there.
        old = self.final.with_name(f"{self.final.name}.replaced")
        if old.exists():
            _remove(old)
        self.final.rename(old)
        self.folder.rename(self.final)
        _remove(old)


def check_target(final: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Raise SlothError unless `final` is free or, with `force`, an earlier export, and none of `sources` is in it."""
    place = final.resolve()
    for source in sources:
        if place == source.resolve() or place in source.resolve().parents:
            raise SlothError(f"{final} holds {source}, which is read; choose another folder")
    if final.is_file():
        raise SlothError(f"{final} is a file; choose a folder")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not force:
        raise SlothError(f"{final} exists; choose another folder, or replace it with --force (force=True)")
    if not any((final / name).is_file() for name in MODELS):
        raise SlothError(f"{final} holds no model, so it is not replaced; choose another folder")


def check_space(folder: Path, wanted: int) -> None:
    """Raise SlothError where the file system of `folder` has less than `wanted` bytes."""
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise SlothError(f"{folder} needs {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")


def save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file so that it is complete once it has its name."""
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def names_in(path: Path) -> list[str]:
    """The tensors of a safetensors file. Raises SlothError where it is damaged."""
    with opened(path) as shard:
        return list(shard.keys())


def tensor_bytes(path: Path) -> int:
    """What a safetensors file holds beside its header, which begins with its own length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def holds(path: Path, names: Iterable[str]) -> bool:
    """Whether a shard of an earlier run is there, whole, with these tensors."""
    try:
        return path.is_file() and set(names) <= set(names_in(path))
    except SlothError:
        return False


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `folder` into one line each."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _number(error)
        kept = "; what is complete is kept there for the next run" if folder.is_dir() else ""
        reason = "the disk is full" if number in FULL else os.strerror(number) if number else line(error)
        raise SlothError(f"cannot write {folder}: {reason}{kept}") from None


def _number(error: Exception) -> int | None:
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
