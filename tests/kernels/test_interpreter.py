"""Runs this folder's op tests on the Triton kernels, interpreted; conftest.py says why in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sloth_plugins.patches.kernels import dispatch

HERE = Path(__file__).parent


def test_backend_of_this_process():
    x = torch.ones(4)
    assert dispatch.backend_for(x) == ("triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is already the interpreter's process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_pass_interpreted():
    files = [
        HERE / f"test_{name}.py"
        for name in (
            "interpreter",
            "rms_norm",
            "layer_norm",
            "rotary",
            "qk_norm_rope",
            "deferred_norm",
            "glu",
            "activate",
            "forwards_mlp",
            "log_probs",
            "vocab_rows",
            "block_norm",
            "seeded_dropout",
            "four_bit",
            "lora_glu",
            "lora_residual",
            "lora_rope",
            "copies",
        )
    ]
    child = subprocess.run(
        # This comes last, when one process would leave the other core idle.
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *map(str, files)],
        # No GPU in sight: the tests' tensors are on the CPU and nothing should be set up for one.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        # Not the repository's root: on sys.path it would hide an installed package behind half of one.
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert child.returncode == 0, child.stdout[-20000:] + child.stderr[-5000:]
