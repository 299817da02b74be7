"""Tiny models with adapters, patched, and what of their calls was decoded here."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "blocks"))


@pytest.fixture(autouse=True)
def _seed(_one_thread):
    torch.manual_seed(0)


@pytest.fixture
def decoded(monkeypatch):
    """What each call has given that was decoded here, so that no test passes on transformers' generate."""
    from sloth_plugins.patches.generation import entry

    found = []
    decode = entry.decode
    monkeypatch.setattr(entry, "decode", lambda *args: (found.append(decode(*args)), found[-1])[1])
    return found


@pytest.fixture
def batch_sizes(monkeypatch):
    """How many rows each step had."""
    from sloth_plugins.patches.generation import decoder

    sizes = []
    advance = decoder._Decoding._advance
    monkeypatch.setattr(decoder._Decoding, "_advance", lambda self: (sizes.append(len(self.rows)), advance(self))[1])
    return sizes
