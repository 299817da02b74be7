"""A loader by the names that fine-tuning scripts know, over transformers and PEFT."""

from .language_model import FastLanguageModel

__all__ = ["FastLanguageModel"]
