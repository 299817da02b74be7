"""llama-quantize, llama-tokenize and a module llama_cpp, over llama.cpp's own library: as others install them.

The npm package has the library without its programs, and llama-cpp-python takes minutes to build. What runs is
llama.cpp.
"""

import ctypes
import os
import stat
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def install_programs(folder: Path) -> Path:
    """Put both programs into `folder`, which goes to the front of PATH."""
    for name in ("llama-quantize", "llama-tokenize"):
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
            f"import llama_programs\nsys.exit(llama_programs.{name.replace('-', '_')}(sys.argv[1:]))\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def install_module(folder: Path) -> Path:
    """Put a module `llama_cpp` into `folder`, which goes to PYTHONPATH."""
    (folder / "llama_cpp.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport llama_programs\n"
        "sys.modules[__name__] = llama_programs\n"
    )
    return folder


def llama_quantize(arguments: list[str]) -> int:
    """INPUT OUTPUT TYPE THREADS."""
    import gguf
    from llama_runtime import messages, quantize

    source, target, kind, _ = arguments
    status = quantize(Path(source), Path(target), int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
    sys.stderr.write("".join(messages))
    return status


def llama_tokenize(arguments: list[str]) -> int:
    """--model FILE --ids --no-bos --no-escape --log-disable --stdin."""
    assert {"--ids", "--no-bos", "--no-escape", "--stdin"} <= set(arguments)
    print(Llama(arguments[arguments.index("--model") + 1]).tokenize(sys.stdin.buffer.read()))
    return 0


class Llama:
    """As much of llama-cpp-python's class as is used."""

    def __init__(self, model_path, vocab_only=False, verbose=True):
        from llama_runtime import Llama as Runtime

        self._model = Runtime(Path(model_path))

    def tokenize(self, text: bytes, add_bos: bool = False, special: bool = True) -> list[int]:
        assert special
        return self._model.tokenize(text.decode(), add_bos)


def llama_model_quantize_default_params():
    from llama_runtime import library

    return library().llama_model_quantize_default_params()


def llama_model_quantize(source: bytes, target: bytes, params) -> int:
    from llama_runtime import QuantizeParams, library

    assert isinstance(params, type(ctypes.byref(QuantizeParams())))
    return library().llama_model_quantize(source, target, ctypes.cast(params, ctypes.POINTER(QuantizeParams)))


def __getattr__(name: str) -> int:
    import gguf

    if not name.startswith("LLAMA_FTYPE_"):
        raise AttributeError(name)
    return int(gguf.LlamaFileType[name.removeprefix("LLAMA_FTYPE_")])


def on_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
