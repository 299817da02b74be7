"""What this process runs on: versions, devices, Triton's state, rank. Versions are looked up once."""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from sloth_plugins.registry import Environment
from sloth_plugins.registry.results import TritonState

from .processes import rank, world_size

REPORTED = (
    *("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl"),
    *("liger-kernel", "kernels", "unsloth"),
)

# Packages that change the same classes: distribution, module, when they do it.
RIVALS = (
    ("unsloth", "unsloth", "rewrites transformers when it is imported"),
    ("liger-kernel", "liger_kernel", "patches the same classes when use_liger_kernel is set"),
    ("kernels", "kernels", "replaces layers when use_kernels is set"),
)


class Versions(Mapping[str, str]):
    """Installed versions by distribution name, looked up when asked for."""

    def __getitem__(self, name: str) -> str:
        """The version; raises KeyError when it is not installed."""
        found = installed_version(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        """The names worth reporting that are installed."""
        return (name for name in REPORTED if installed_version(name) is not None)

    def __len__(self) -> int:
        """How many of the names worth reporting are installed."""
        return sum(1 for _ in self)


@cache
def installed_version(name: str) -> str | None:
    """The version of what `import` finds; None when it is not installed.

    A module that is already imported speaks for itself, since another copy may precede it on sys.path.
    """
    module = sys.modules.get(name.replace("-", "_"))
    imported = getattr(module, "__version__", None)
    if isinstance(imported, str):
        return imported
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def triton_state() -> TritonState:
    """Whether Triton kernels can run here, and how."""
    if installed_version("triton") is None:
        return "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    import torch

    return "compiled" if torch.cuda.is_available() else "no device"


def conflicts() -> tuple[str, ...]:
    """Packages in this process that change the same classes as we do, each with when it does."""
    return tuple(f"{name} {when}" for name, module, when in RIVALS if module in sys.modules and name != "kernels")


def probe() -> Environment:
    """Read the environment. Imports torch."""
    import torch

    cuda = torch.cuda.is_available()
    devices = (
        tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if cuda else ("cpu",)
    )
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        versions=Versions(),
        devices=devices,
        capability=torch.cuda.get_device_capability() if cuda else None,
        triton=triton_state(),
        rank=rank(),
        world_size=world_size(),
    )
