"""One tiny model for all tests of a module, and caches that are theirs alone."""

import pytest
from tiny_models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def options():
    """Small enough for a test."""
    return {"samples": 4, "length": 32, "device": "cpu"}
