"""Programs run in forks of a process that has imported what takes seconds: `python warm.py`, started by launching.py.

It reads lines of JSON, each a program with its arguments, folder, the environment of each of its processes and the
files for what they write, and answers with the worst exit code. How a process starts, and what it imports first, is for
programs that are started anew.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback

IMPORTS = (
    "torch",
    "transformers.trainer",
    "peft",
    "accelerate",
    "datasets",
    "trl.trainer.sft_trainer",
    "typer",
    "rich",
)


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        children = []
        for environment in given.pop("environments"):
            children.append(os.fork())
            if children[-1] == 0:
                become(environment=environment, **given)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(max(codes, key=abs), flush=True)


def become(command, folder, environment, stdout, stderr, timeout) -> None:
    """In the child: be a new Python with these arguments, and end as it would."""
    signal.alarm(timeout)
    for stream, place in ((0, os.devnull), (1, stdout), (2, stderr)):
        os.dup2(os.open(place, os.O_RDWR | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = exit_code(command)
    with contextlib.suppress(SystemExit):
        threading._shutdown()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Finalising all that was imported takes seconds.
    os._exit(code)


def exit_code(command) -> int:
    try:
        execute(command)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - as the interpreter does with whatever leaves a program
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        traceback.print_exc()
        return 1
    return 0


def execute(command) -> None:
    """`-c CODE` or a script, and its arguments, after what torch calls at the end of its import."""
    what, *rest = command
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    importlib.invalidate_caches()
    from sloth_plugins.autoload import autoload

    autoload()
    if what == "-c":
        sys.argv, sys.path[0:0] = ["-c", *rest[1:]], [""]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0:0] = [what, *rest], [os.path.dirname(os.path.abspath(what))]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
