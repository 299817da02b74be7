"""llama.cpp itself, by ctypes: load a file, tokenize, logits of every position, quantize.

The structs of llama.h change between its releases, so parameters are opaque and larger than any of them: on x86-64 they
are passed in memory, and the callee reads only as much as it knows. The few leading fields that are set here are
checked against their known defaults.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from fetch_llama_cpp import LIBRARIES, NPM_VERSION

c_int, c_void = ctypes.c_int32, ctypes.c_void_p
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, c_void)


class ModelParams(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_uint64 * 128),)


class ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("opaque", ctypes.c_uint64 * 126),
    )


class QuantizeParams(ctypes.Structure):
    _fields_ = (("nthread", c_int), ("ftype", c_int), ("opaque", ctypes.c_uint64 * 127))


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int),
        ("token", ctypes.POINTER(c_int)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(c_int)),
        ("n_seq_id", ctypes.POINTER(c_int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def require() -> None:
    """Skip a test where llama.cpp was not fetched; in CI that is a failure."""
    if (LIBRARIES / NPM_VERSION).is_file():
        return
    import pytest

    if os.environ.get("CI"):
        pytest.fail("llama.cpp is not here; `make llama` fetches it, and CI must have it", pytrace=False)
    pytest.skip("llama.cpp is not here; `make llama` fetches it")


@LogCallback
def _log(level, text, data):
    messages.append(text.decode(errors="replace"))
    del messages[:-200]


messages: list[str] = []


@cache
def library():
    for name in ("libggml-base.so", "libggml.v0.5.0.so", "libllama.v0.5.0.so"):
        lib = ctypes.CDLL(str(LIBRARIES / name), mode=ctypes.RTLD_GLOBAL)
        if name == "libggml.v0.5.0.so":
            lib.ggml_backend_load_all_from_path(str(LIBRARIES).encode())
    signatures = {
        "llama_log_set": (None, [LogCallback, c_void]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_quantize_default_params": (QuantizeParams, []),
        "llama_model_quantize": (ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]),
        "llama_model_load_from_file": (c_void, [ctypes.c_char_p, ModelParams]),
        "llama_model_free": (None, [c_void]),
        "llama_init_from_model": (c_void, [c_void, ContextParams]),
        "llama_free": (None, [c_void]),
        "llama_set_n_threads": (None, [c_void, c_int, c_int]),
        "llama_model_get_vocab": (c_void, [c_void]),
        "llama_model_n_swa": (c_int, [c_void]),
        "llama_vocab_n_tokens": (c_int, [c_void]),
        "llama_vocab_is_eog": (ctypes.c_bool, [c_void, c_int]),
        "llama_vocab_eot": (c_int, [c_void]),
        "llama_vocab_get_add_bos": (ctypes.c_bool, [c_void]),
        "llama_tokenize": (
            c_int,
            [c_void, ctypes.c_char_p, c_int, ctypes.POINTER(c_int), c_int, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_token_to_piece": (c_int, [c_void, c_int, ctypes.c_char_p, c_int, c_int, ctypes.c_bool]),
        "llama_batch_init": (Batch, [c_int, c_int, c_int]),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (c_int, [c_void, Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [c_void]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    lib.llama_backend_init()
    defaults = lib.llama_context_default_params()
    assert (defaults.n_ctx, defaults.n_batch, defaults.n_ubatch) == (512, 2048, 512), "llama.h has changed"
    return lib


class Llama:
    """A model that llama.cpp has loaded."""

    def __init__(self, path: Path):
        self.lib = library()
        messages.clear()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, "llama.cpp cannot load it: " + "".join(messages[-5:])
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        data = text.encode()
        room = (c_int * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), room, len(room), add_special, True)
        assert count >= 0
        return list(room[:count])

    def logits(self, ids: list[int], n_ctx: int | None = None) -> np.ndarray:
        """Logits [tokens, vocabulary] in fp32, in one thread.

        That is a new one at each call: it sets the processor's tiles (AMX) up once for each thread, and where torch has
        used and released them since, their instructions are illegal.
        """
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._logits, ids, n_ctx).result()

    def _logits(self, ids: list[int], n_ctx: int | None) -> np.ndarray:
        params = self.lib.llama_context_default_params()
        params.n_ctx = max(n_ctx or 0, len(ids))
        params.n_batch = params.n_ubatch = len(ids)
        context = self.lib.llama_init_from_model(self.model, params)
        assert context, "".join(messages[-5:])
        self.lib.llama_set_n_threads(context, 1, 1)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for n, token in enumerate(ids):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, n, 1, 1
                batch.seq_id[n][0] = 0
            assert self.lib.llama_decode(context, batch) == 0, "".join(messages[-5:])
            shape = (len(ids), self.lib.llama_vocab_n_tokens(self.vocab))
            return np.ctypeslib.as_array(self.lib.llama_get_logits(context), shape).copy()
        finally:
            self.lib.llama_batch_free(batch)
            self.lib.llama_free(context)


def quantize(source: Path, target: Path, file_type: int) -> int:
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, file_type
    return lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
