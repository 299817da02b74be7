"""What llama-quantize and llama-tokenize do, by llama-cpp-python: `python -m ... quantize|tokenize ARGUMENTS`."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from sloth_plugins.export.gguf.methods import file_type


def quantize(source: str, target: str, method: str, threads: str) -> int:
    """Write `target`; the status is llama.cpp's."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type(method.lower())
    parameters.nthread = int(threads)
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


def tokenize(model: str) -> int:
    """Print the ids of the text on standard input, as a JSON list."""
    import llama_cpp

    reader = llama_cpp.Llama(model_path=str(Path(model)), vocab_only=True, verbose=False)
    sys.stdout.write(f"{reader.tokenize(sys.stdin.buffer.read(), add_bos=False, special=True)}\n")
    return 0


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    sys.exit(quantize(*arguments) if task == "quantize" else tokenize(arguments[0]))
