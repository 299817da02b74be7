"""Which of the training processes this is, before and after torch.distributed is up; and what only the first says."""

import os
import sys


def rank() -> int:
    """This process's global rank: torch.distributed's once it is up, else the launcher's variables, else 0."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return _from_launcher("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", default=0)


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return _from_launcher("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


def say(text: str) -> None:
    """Print to stderr, on the main process."""
    if rank() == 0:
        print(f"sloth-plugins: {text}", file=sys.stderr, flush=True)  # noqa: T201 - whatever logging the script sets up


def _from_launcher(*names: str, default: int) -> int:
    for name in names:
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit():
            return int(value)
    return default
