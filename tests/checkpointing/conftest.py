"""Helpers of the tests of plans: the tiny models with adapters that the tests of blocks have."""

import sys
from pathlib import Path

import pytest

from sloth_plugins.patches.kernels import notices

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "blocks")]


@pytest.fixture
def runs(monkeypatch):
    """The `Run` of each layer that ran fused, so that no test passes on upstream's forward."""
    from sloth_plugins.patches.blocks import decoder_layer

    seen = []
    run = decoder_layer._Fused.run
    monkeypatch.setattr(decoder_layer._Fused, "run", lambda self, *args: (seen.append(args[0]), run(self, *args))[1])
    return seen


@pytest.fixture
def said(monkeypatch):
    """What users are told, as if nothing had been said before."""
    lines = set()
    monkeypatch.setattr(notices, "_said", lines)
    return lines
