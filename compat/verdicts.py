"""What a cell of the matrix is, and how far a patched training run may be from a stock one."""

from dataclasses import dataclass, field
from typing import Any

# Steps of SGD in fp32: two orders of rounding stay this near to each other, another formula does not.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(slots=True)
class Cell:
    """A verdict. `failed` names the checks that did not hold; `reason` says it in words, `diff` shows changed code."""

    model_type: str
    patch: str
    state: str = "green"
    reason: str = ""
    failed: list[str] = field(default_factory=list)
    diff: str = ""
    seconds: float = 0.0

    def is_unsupported(self, unmet: Any) -> bool:
        """Whether a `Skip` says that the patch is not meant for these versions; the cell then says so too."""
        if unmet is None or not (unmet.reason == "version" or unmet.reason.startswith("unsupported")):
            return False
        found = f", found {unmet.found}" if unmet.found else ""
        self.state, self.reason = "unsupported", f"needs {unmet.required}{found}" if unmet.required else unmet.reason
        return True

    def fail(self, check: str, detail: str) -> None:
        """Note a check that does not hold."""
        self.state = "red"
        self.failed.append(check)
        self.reason = "; ".join(filter(None, (self.reason, f"{check}: {' '.join(detail.split())[:300]}")))


@dataclass(slots=True)
class Training:
    """What a training run left: everything that a patch must not change."""

    losses: list[float]
    gradients: list[dict[str, Any]]
    checkpoint_calls: list[int]
    patched: int = 0


def lora(model: Any) -> Any:
    """The model with adapters on all linears, their B not zero, so that every gradient is one."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def gradient_distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative distance of a parameter's gradient; infinite if one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    whole = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    # A gradient that is nothing beside the others is rounding.
    return max(
        float((grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-4 * whole))
        for name, grad in found.items()
    )
