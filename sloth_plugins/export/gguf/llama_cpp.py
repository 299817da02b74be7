"""llama.cpp, as it is installed: llama-cpp-python, else its programs on PATH. Always in a process of its own.

A fault in C++ ends that process and not this one, and its memory goes back when it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...errors import SlothError
from ..progress import progress

QUANTIZE, TOKENIZE = "llama-quantize", "llama-tokenize"
HOW = (
    "pip install llama-cpp-python, or put llama-quantize on PATH, which https://github.com/ggml-org/llama.cpp/releases "
    "has for every system"
)
STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
CHILD = Path(__file__).with_name("llama_cpp_child.py")


def quantizer() -> list[str] | None:
    """The command that quantises: its arguments are a file, another to write, and the type in capitals."""
    return _command(QUANTIZE, "quantize")


def require_quantizer(method: str) -> None:
    """Raise SlothError where nothing here can make a file of that type."""
    if quantizer() is None:
        raise SlothError(f"{method} is made by llama.cpp, which is not here: {HOW}")


def quantize(source: Path, target: Path, method: str) -> None:
    """Make `target` of a written file. Raises SlothError with llama.cpp's last words where it fails."""
    command = quantizer()
    if command is None:
        raise SlothError(f"{method} is made by llama.cpp, which is not here: {HOW}")
    lines: list[str] = []
    arguments = [*command, str(source), str(target), method.upper(), str(os.cpu_count() or 1)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    size, shown = source.stat().st_size, 0
    with progress(f"making {method}", size) as advance, subprocess.Popen(arguments, **pipes) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                lines = [*lines[-20:], line.strip()]
                step = STEP.search(line)
                done = size * int(step[1]) // int(step[2]) if step else shown
                advance(done - shown)
                shown = done
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        said = next((line for line in reversed(lines) if "error" in line.lower() or "fail" in line.lower()), "")
        raise SlothError(f"llama.cpp could not make {method}: {said or (lines or ['no message'])[-1]}")


def can_tokenize() -> bool:
    """Whether llama.cpp is here to read a file that was written."""
    return _command(TOKENIZE, "tokenize") is not None


def tokenize(model: Path, text: str) -> list[int] | None:
    """The ids that llama.cpp makes of a text, special tokens parsed and none added; None where it is not here."""
    command = _command(TOKENIZE, "tokenize")
    if command is None:
        return None
    if command[0] != sys.executable:
        command += ["--model"]
    flags = ["--ids", "--no-bos", "--no-escape", "--log-disable", "--stdin"]
    done = subprocess.run([*command, str(model), *flags], input=text.encode(), capture_output=True)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise SlothError(f"llama.cpp cannot read the file that was written: {last[0]}")
    found: list[int] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return found


def _command(program: str, task: str) -> list[str] | None:
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-P", str(CHILD), task]
    found = shutil.which(program)
    return None if found is None else [found]


def check_tokens(model: Path, tokenizer: Any, lines: tuple[str, ...], after: str = "") -> bool:
    """Whether llama.cpp was here to compare with. Raises SlothError naming where it splits the lines otherwise.

    `after` is a special token that comes first, for a tokenizer that begins a text otherwise where there is none.
    """
    text = after + "\n".join(lines)
    found = tokenize(model, text)
    if found is None:
        return False
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        at = next((n for n, (left, right) in pairs if left != right), min(len(found), len(expected)))
        near = tokenizer.decode(expected[max(0, at - 3) : at + 5])
        raise SlothError(
            f"llama.cpp tokenizes otherwise than this tokenizer near {near!r}: {found[at : at + 5]} where it has "
            f"{expected[at : at + 5]}"
        )
    return True
