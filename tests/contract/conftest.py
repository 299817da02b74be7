"""Every contract test runs on every model type of every architecture."""

import pytest
from models import KINDS


@pytest.fixture(params=KINDS, ids=[kind for _, kind in KINDS])
def architecture(request):
    return request.param
