"""Helpers of the tests of fused blocks: tiny models of every family with adapters, stock and fused."""

import sys
from pathlib import Path

import pytest
import torch

from sloth_plugins.patches.kernels import notices

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
