"""Folders as their content, and merges into them that are refused."""

import pytest

from sloth_plugins.errors import SlothError
from sloth_plugins.export import merge

SHARD = 100_000


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(match, *args, **options):
    with pytest.raises(SlothError, match=match) as caught:
        merge(*args, **options)
    assert "\n" not in str(caught.value)
