"""What a user should know about a path that was taken, said once and on the main process only."""

import logging
import os

_logger = logging.getLogger("sloth_plugins")


_said: set[str] = set()


def say_once(text: str, topic: str | None = None) -> None:
    """Log a line as a warning, the first time that it or another one on its topic comes."""
    key = text if topic is None else topic
    if key not in _said and os.environ.get("RANK", "0") == "0":
        _logger.warning("sloth-plugins: %s", text)
    _said.add(key)
