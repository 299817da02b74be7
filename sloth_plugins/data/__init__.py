"""Data preparation on `datasets`: rows read and checked, dialogues, roles, what is trained on. Loaded on first use."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .responses import train_on_responses_only
    from .roles import standardize_data_formats, standardize_sharegpt
    from .rows import check_rows, load_rows
    from .sharegpt import to_sharegpt
    from .templates import get_chat_template

__all__ = [
    "check_rows",
    "get_chat_template",
    "load_rows",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]

__getattr__ = loader(
    __name__,
    {
        "check_rows": "rows",
        "get_chat_template": "templates",
        "load_rows": "rows",
        "standardize_data_formats": "roles",
        "standardize_sharegpt": "roles",
        "to_sharegpt": "sharegpt",
        "train_on_responses_only": "responses",
    },
)
