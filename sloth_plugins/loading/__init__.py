"""A loader by the names that fine-tuning scripts know, over transformers and PEFT."""

from .language_model import FastLanguageModel
from .pretrained import is_bfloat16_supported

__all__ = ["FastLanguageModel", "is_bfloat16_supported"]
