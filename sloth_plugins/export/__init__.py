"""Taking a trained model home: merged checkpoints, GGUF and Ollama, the Hub. Everything is loaded on first use."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .attaching import attach
    from .gguf import save_pretrained_gguf
    from .hub import push, push_to_hub_gguf, push_to_hub_merged
    from .merging import merge, save_pretrained_merged
    from .weights import Weights, open_weights

__all__ = [
    "Weights",
    "attach",
    "merge",
    "open_weights",
    "push",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "save_pretrained_merged",
]

__getattr__ = loader(
    __name__,
    {
        "Weights": "weights",
        "attach": "attaching",
        "merge": "merging",
        "open_weights": "weights",
        "push": "hub",
        "push_to_hub_gguf": "hub",
        "push_to_hub_merged": "hub",
        "save_pretrained_gguf": "gguf",
        "save_pretrained_merged": "merging",
    },
)
