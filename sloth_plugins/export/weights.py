"""A model's tensors one by one, under the names of its checkpoint, whatever they are read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SlothError

if TYPE_CHECKING:
    import torch


class Weights(Protocol):
    """A model's tensors under stock Hugging Face names, as `save_pretrained` writes them: merged and dequantised.

    Nothing is held whole: a read takes one tensor's memory beyond what the source itself holds.
    """

    config: Any
    """The configuration of the merged model, without `quantization_config`."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name in the checkpoint's order with its shape; a head that is tied to the embedding is absent."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, the caller's own: fp32 where merged or dequantised, else in its stored dtype."""
        ...


def open_weights(source: Any, base: str | Path | None = None) -> Weights:
    """The weights of `source`: a checkpoint's folder, a PEFT or Trainer output folder, or a live model.

    `base` names the folder of the base model where the adapter's own `base_model_name_or_path` does not hold.
    Raises SlothError where there is no model, or where its files are damaged.
    """
    from .checkpoint import Checkpoint

    if isinstance(source, str | Path):
        return Checkpoint(Path(source))
    raise SlothError(f"cannot export a {type(source).__name__}: give a folder or a model")
