"""What several folders of tests share."""

import gc
import os

import pytest

# The tests choose for themselves; a flag in the shell must not activate the patches in the test process.
os.environ.pop("SLOTH_PLUGINS", None)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Whenever a trainer begins it collects garbage: half a second of looking through all modules that are imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Extension modules complain of what nobody frees at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _inactive():
    """No test leaves the seams open or a module's function replaced."""
    from sloth_plugins.activation import deactivate

    yield
    deactivate()


@pytest.fixture
def _one_thread():
    """Torch computes in this one, where waiting for others would take longer than what they do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    from sloth_plugins.patches.kernels import notices

    lines = set()
    monkeypatch.setattr(notices, "_said", lines)
    return lines
