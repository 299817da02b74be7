"""What llama-quantize and llama-tokenize do, by llama-cpp-python. A program: it imports nothing else."""

import ctypes
import sys


def quantize(source: str, target: str, method: str, threads: str) -> int:
    """Write `target`; the status is llama.cpp's."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{method}")
    parameters.nthread = int(threads)
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


def tokenize(model: str) -> int:
    """Print the ids of the text on standard input, as a JSON list."""
    import llama_cpp

    reader = llama_cpp.Llama(model_path=model, vocab_only=True, verbose=False)
    sys.stdout.write(f"{reader.tokenize(sys.stdin.buffer.read(), add_bos=False, special=True)}\n")
    return 0


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    sys.exit(quantize(*arguments) if task == "quantize" else tokenize(arguments[0]))
