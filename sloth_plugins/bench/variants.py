"""What is compared: the same training, each time with something else that should make it faster."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SlothError, nearest
from ..selection import VARIABLE


@dataclass(frozen=True, slots=True)
class Rival:
    """Somebody else's package: the module that it installs, and the name to install it by."""

    module: str
    package: str


STOCK, PATCHED = "stock", "patched"
RIVALS = {"liger": Rival("liger_kernel", "liger-kernel"), "unsloth": Rival("unsloth", "unsloth")}


def variants(compare: str) -> list[str]:
    """Stock, patched and the rivals in a list such as `liger,unsloth`.

    Raises SlothError for a name that is not known or not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
    for name in names:
        if name not in RIVALS:
            raise SlothError(
                f"--compare {compare!r}: {name!r} is not one of {', '.join(RIVALS)}{nearest(name, RIVALS)}"
            )
        if importlib.util.find_spec(RIVALS[name].module) is None:
            raise SlothError(f"--compare {compare!r}: {name} is not installed; pip install {RIVALS[name].package}")
    return [STOCK, PATCHED, *names]


def environment(variant: str, select: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables of a run's process: the flag for the patched one alone, and one GPU for all."""
    own = {name: value for name, value in inherited.items() if name != VARIABLE}
    if variant == PATCHED:
        own[VARIABLE] = select
    # Trainer would split each batch among all GPUs that it sees.
    own["CUDA_VISIBLE_DEVICES"] = inherited.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    # Threads that wait by spinning make steps many times slower where other programs use the same cores.
    own.setdefault("OMP_WAIT_POLICY", "passive")
    return own | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
