"""A model's tensors one by one, under the names of its checkpoint, whatever they are read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SlothError

if TYPE_CHECKING:
    import torch

    from .changes import Merged


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


def open_weights(source: Any, base: str | Path | None = None) -> Merged:
    """The weights of `source`: a checkpoint's folder, a PEFT or Trainer output folder, or a live model.

    A folder without a model of its own stands for its newest `checkpoint-N`. Of a live model with several adapters, the
    active ones are merged. `base` names the folder of the base model where the adapter's own
    `base_model_name_or_path` does not hold. Raises SlothError where there is no model, where its files are damaged, or
    where the adapter is of another base.
    """
    from .adapter import Adapter
    from .changes import Merged
    from .checkpoint import Checkpoint
    from .live import LiveModel
    from .sources import ADAPTER, base_folder, model_folder

    if not isinstance(source, str | Path):
        live = LiveModel(source)
        return Merged(live, live.changes, "the adapter")
    folder = model_folder(Path(source))
    if not (folder / ADAPTER).is_file():
        if base is not None:
            raise SlothError(f"{folder} is a whole model; a base ({base}) goes with an adapter")
        return Merged(Checkpoint(folder), {}, "")
    adapter = Adapter(folder)
    checkpoint = Checkpoint(base_folder(folder) if base is None else model_folder(Path(base)))
    return Merged(checkpoint, adapter.changes(checkpoint), str(folder))
