"""What several folders of tests share."""

import os

import pytest

# The tests choose for themselves; a flag in the shell must not activate the patches in the test process.
os.environ.pop("SLOTH_PLUGINS", None)


@pytest.fixture(autouse=True)
def _inactive():
    """No test leaves the seams open or a module's function replaced."""
    from sloth_plugins.activation import deactivate

    yield
    deactivate()
