"""The matrix's programs are scripts, not a package: they are found where they lie."""

import sys

from paths import ROOT

sys.path.insert(0, str(ROOT / "compat"))
