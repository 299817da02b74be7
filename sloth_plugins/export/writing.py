"""A folder that appears whole under its name or not at all: written elsewhere, continued after an interruption."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SlothError
from .checkpoint import cannot_read, line, opened
from .marking import LOCK, MARK, mark, record, refuse_others

if TYPE_CHECKING:
    import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INSIDE = ".sloth-plugins.partial"


def staging(final: Path) -> Path:
    """Where a folder is written before it has its name: beside that, or inside where an empty folder has it already.

    An empty folder may be where a disk is mounted or somebody's present folder, neither of which can be renamed.
    """
    place = final.resolve()
    if place.is_dir() and all(path.name == INSIDE for path in place.iterdir()):
        return place / INSIDE
    return place.with_name(f"{place.name}.partial")


class Staged:
    """A folder that is written under `staging(final)` and gets its final name when it is whole.

    `inputs` says what the files are made of; complete ones are kept for the next run of the same inputs. None keeps
    nothing. `check_target` has agreed to `final`.
    """

    def __init__(self, final: Path, inputs: dict[str, object] | None) -> None:
        self.final = final.resolve()
        self.folder = staging(final)
        self._inside = self.folder.parent == self.final
        self._replaces = self.final.is_dir() and not self._inside
        text = json.dumps(inputs, sort_keys=True)
        self._inputs = None if inputs is None else hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The folder, which gets its final name at the end; on an error complete shards stay for the next run."""
        from filelock import FileLock, Timeout

        with telling(self.folder):
            if self.folder.is_dir() and record(self.folder) is None:
                refuse_others(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                raise SlothError(f"{self.folder} is being written by another process") from None
            try:
                self._forget_other_inputs()
                yield self.folder
                mark(self.folder, self._inputs)
            except BaseException:
                self._keep_what_is_complete()
                raise
            finally:
                lock.release()
                (self.folder / LOCK).unlink(missing_ok=True)
                if self.folder.is_dir() and not any(self.folder.iterdir()):
                    self.folder.rmdir()
        self._publish()

    def _forget_other_inputs(self) -> None:
        known = record(self.folder)
        same = known is not None and self._inputs is not None and known.get("inputs") == self._inputs
        for path in self.folder.iterdir():
            if path.name != LOCK and not (same and path.suffix == ".safetensors"):
                _remove(path)
        mark(self.folder, self._inputs)

    def _keep_what_is_complete(self) -> None:
        shards = list(self.folder.glob("*.safetensors")) if self._inputs is not None else []
        for path in self.folder.iterdir():
            if path.name != LOCK and path not in shards and not (shards and path.name == MARK):
                _remove(path)

    def _publish(self) -> None:
        try:
            if self._inside:
                _move_up(self.folder)
            elif self._replaces:
                _replace(self.final, self.folder)
            else:
                self.folder.rename(self.final)
        except OSError as error:
            raise SlothError(
                f"cannot rename {self.folder} to {self.final}: {error.strerror}; all of it stays there"
            ) from None


def _move_up(folder: Path) -> None:
    """Every file into the folder above, which holds nothing else; the marker last, since it says that all is there."""
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
            if os.path.lexists(folder.parent / path.name):
                raise FileExistsError(errno.EEXIST, f"{path.name} has come there meanwhile")
            path.rename(folder.parent / path.name)
            moved.append(path)
    except BaseException:
        for path in moved:
            (folder.parent / path.name).rename(path)
        raise
    folder.rmdir()


def _replace(final: Path, new: Path) -> None:
    """The old export goes only when the new one is there, and comes back where that fails."""
    refuse_others(final)
    old = _replaced(final)
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    try:
        _remove(old)
    except OSError as error:
        raise SlothError(f"{final} is written; the earlier export stays in {old}: {error.strerror}") from None


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def check_target(final: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Raise SlothError unless `final` is free or, with `force`, an earlier export alone, and no source is in it."""
    try:
        _check_target(final, final.resolve(), sources, force)
    except OSError as error:
        raise cannot_read(final, error) from None


def _check_target(final: Path, place: Path, sources: Iterable[Path], force: bool) -> None:
    if place.is_file():
        raise SlothError(f"{final} is a file; choose a folder")
    for source in sources:
        for written in (place, staging(final)):
            if written in (source.resolve(), *source.resolve().parents):
                raise SlothError(f"{written} holds {source}, which is read; choose another folder")
    if not place.is_dir() or all(path.name == INSIDE for path in place.iterdir()):
        return
    if not force:
        raise SlothError(f"{final} exists; choose another folder, or replace it with --force (force=True)")
    refuse_others(place)
    if place.is_mount() or place == Path.cwd():
        raise SlothError(f"{final} is a mount point or the present folder, which cannot be replaced; empty it first")
    if os.path.lexists(_replaced(place)):
        raise SlothError(f"{_replaced(place)} is in the way, where {final} goes while it is replaced; move it away")


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
