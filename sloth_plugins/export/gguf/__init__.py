"""GGUF files for llama.cpp and Ollama, from a merged model, an adapter with its base, or a live model."""

from .export import Exported, export, save_pretrained_gguf

__all__ = ["Exported", "export", "save_pretrained_gguf"]
