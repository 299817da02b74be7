"""`python -m sloth_plugins`: doctor when alone, the command line, or a training script run with the patches.

`accelerate launch -m sloth_plugins train.py ...` is for places where torch's autoload is switched off.
"""

import os
import runpy
import sys


def _run_script(script: str) -> None:
    """Run a script as `python script` would, activated; SLOTH_PLUGINS chooses and defaults to everything."""
    from .activation import activate
    from .errors import SlothError
    from .selection import VARIABLE

    os.environ.setdefault(VARIABLE, "1")
    try:
        activate()
    except SlothError as error:
        print(f"sloth-plugins: {error}", file=sys.stderr)  # noqa: T201 - the process ends with this line
        raise SystemExit(2) from None
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Decide by the first argument: a Python file is run, anything else is the command line's."""
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        if not os.path.isfile(sys.argv[1]):
            print(f"sloth-plugins: no such script: {sys.argv[1]!r}", file=sys.stderr)  # noqa: T201 - the answer
            raise SystemExit(2)
        _run_script(sys.argv[1])
        return
    from .cli import main as command_line

    if len(sys.argv) == 1:
        sys.argv.append("doctor")
    command_line()


if __name__ == "__main__":
    main()
