"""Taking a trained model home: merged checkpoints, GGUF and Ollama, the Hub. Everything is loaded on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .weights import Weights, open_weights

__all__ = ["Weights", "open_weights"]

_HOME = {
    "Weights": "weights",
    "open_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
