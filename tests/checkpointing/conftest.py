"""Helpers of the tests of plans: the tiny models with adapters that the tests of blocks have."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "blocks")]
