"""What torch calls at the end of `import torch`, in every process.

Only the environment is looked at unless SLOTH_PLUGINS asks for something. No exception may leave `autoload`: torch
would fail to import with a misleading message. A mistake in SLOTH_PLUGINS ends the process with exit code 2.
"""

import os
import sys


def autoload() -> None:
    """Activate if SLOTH_PLUGINS is set."""
    if not os.environ.get("SLOTH_PLUGINS"):
        return
    from .errors import SlothError

    try:
        from .activation import activate

        activate()
    except SlothError as error:
        print(f"sloth-plugins: {error}", file=sys.stderr)  # noqa: T201 - no logging is set up this early
        raise SystemExit(2) from None
    except Exception as error:  # noqa: BLE001 - torch must stay importable whatever is wrong with us
        message = f"sloth-plugins: not activated, {type(error).__name__}: {error}"
        print(message, file=sys.stderr)  # noqa: T201 - no logging is set up this early
