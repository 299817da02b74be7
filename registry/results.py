"""What the runtime tells an extension: the environment, the plan for a model, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .model import Patch

TritonState = Literal["compiled", "interpreter", "no device", "not installed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """This process: versions by distribution name, devices, Triton's state and the place in a distributed run."""

    python: str
    platform: str
    versions: Mapping[str, str]
    devices: tuple[str, ...]
    capability: tuple[int, int] | None
    triton: TritonState
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Why a patch does not apply: in words, and where it is a matter of versions or settings, as two values."""

    reason: str
    required: str = ""
    found: str = ""

    def __str__(self) -> str:
        """One line for a table."""
        if self.required:
            return f"{self.reason}: needs {self.required}, found {self.found}"
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanItem:
    """What is meant to happen to one patch; `skip` is None where it is to be applied.

    `selected` says whether the selection asks for it, `named` whether the user wrote its name, in which case a
    skip is an error. `architecture` is the name of the spec, a trainer's too; `family` is the spec's, for reports, and
    defaults to `architecture`.
    """

    architecture: str
    patch: Patch
    family: str = ""
    selected: bool
    named: bool = False
    skip: Skip | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.architecture)


@dataclass(slots=True)
class Plan:
    """All patches of one model's architectures, in the order in which they apply. Hooks may change `items`."""

    items: list[PlanItem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one patch on one model: `modules` counts the instances that run the replacement.

    `tested` is what the compat matrix says of it on the installed transformers. `trainer` is the name of the trainer's
    class where the patch is one of trainers; `modules` is then 1 or 0.
    """

    architecture: str
    patch: str
    family: str = ""
    state: Literal["applied", "skipped", "off"]
    modules: int = 0
    reason: str = ""
    tested: str = ""
    trainer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.architecture)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All outcomes for one model. `unknown` holds model types that no architecture covers.

    `towers` holds the parts of a covered model that stay stock, such as its vision tower.

    `changed` counts the modules and trainers that were given another class by this very call; a `dry` report is a plan.
    """

    environment: Environment
    selection: str
    outcomes: tuple[Outcome, ...]
    unknown: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    changed: int = 0
    dry: bool = False

    @property
    def applied(self) -> tuple[Outcome, ...]:
        """The outcomes with at least one patched module."""
        return tuple(outcome for outcome in self.outcomes if outcome.state == "applied")
