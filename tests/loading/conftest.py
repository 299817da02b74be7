"""A tiny Llama with a byte-level tokenizer in a folder, made on the spot."""

import dataclasses

import pytest
import torch
from loading_pairs import PAIRS

from sloth_plugins.demo.prepare import CPU_SHAPE, build_model, build_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SLOTH_PLUGINS", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "tiny"
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 192, "vocabulary": 320}
    # bitsandbytes' evaluation in four bits on a CPU takes multiples of 64.
    shape = dataclasses.replace(CPU_SHAPE, **sizes)
    tokenizer = build_tokenizer(PAIRS, shape.vocabulary)
    build_model(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
