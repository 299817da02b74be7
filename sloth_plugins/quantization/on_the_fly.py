"""A 16-bit model that is loaded in dynamic 4-bit: what `from_pretrained` is told, and the values that it gets then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.formats import dtype_of
from ..export.weights import open_weights
from ..processes import say
from .calibration import Work
from .decision import BUDGET, Decision, config_of, decide
from .measuring import LENGTH, SAMPLES, measure, rows_of, source_folder, torch_device
from .packing import Packing
from .rounding_pass import chosen_values, forget, pass_name
from .text import BUILTIN

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class OnTheFly:
    """The model in `folder`, of which it is decided what stays in 16 bits."""

    folder: Path
    decision: Decision

    @classmethod
    def decided(cls, model: str | Path, budget: str = BUDGET) -> OnTheFly:
        """Of a folder or a model in the Hub's cache, measured unless it has been; raises SlothError as `measure`."""
        folder = source_folder(model)
        return cls(folder, decide(measure(folder, samples=SAMPLES, length=LENGTH), budget))

    def config(self, compute: torch.dtype) -> Any:
        """The BitsAndBytesConfig to load it by, which computes in that dtype."""
        return config_of(self.decision, compute)

    def put_values(self, model: Any) -> None:
        """Give the 4-bit layers of `model`, loaded by `config`, the values that suit what they compute of the text.

        Their scales stay as bitsandbytes has made them. `model` may be a PeftModel. The values are kept with the
        measurement for the next time, those of one choice alone.
        """
        from bitsandbytes.nn import Linear4bit

        weights = open_weights(self.folder)
        packing = Packing(dtype=dtype_of(None, weights.config))
        measurement, kept = self.decision.measurement, self.decision.kept
        paths = [linear.name for linear in measurement.linears if linear.name not in kept]
        work = Work(measurement.inputs.parent)
        rows = rows_of(self.folder, BUILTIN, SAMPLES, LENGTH)
        with work.alone():
            forget(work, but=pass_name(kept))
            values = chosen_values(weights, rows, paths, kept, packing, torch_device(None), work)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            for name, module in base.named_modules():
                path = name.replace(".base_layer", "")
                if isinstance(module, Linear4bit) and path in values:
                    module.weight.data.copy_(work.read(values.pop(path))["data"])
        if values:
            some = f"{len(values)} of {len(paths)} linear layers"
            say(f"{some} keep the nearest 4-bit values: as loaded the model has no 4-bit {min(values)}")
