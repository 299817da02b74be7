"""A run and its base to be damaged, a small Llama with its tokenizer, and a disk that fails."""

import shutil

import pytest
from adapted_models import adapt, load, save_base, without


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base", shard="100KB")
    adapt(load(folder / "base")).save_pretrained(folder / "run")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    from gguf_tiny import byte_level

    return byte_level("llama-bpe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    from gguf_tiny import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "my-llama", tokenizer)


@pytest.fixture
def place(made, tmp_path):
    """A run and its base that a test may damage."""
    shutil.copytree(made, tmp_path / "made")
    without(tmp_path / "made" / "run", base_model_name_or_path=str(tmp_path / "made" / "base"))
    return tmp_path / "made"


@pytest.fixture
def fails_at_second(monkeypatch):
    """The second shard's write ends as the operating system would have it."""

    def arrange(error):
        from safetensors import torch as safetensors

        real, calls = safetensors.save_file, []

        def save_file(tensors, path, **options):
            calls.append(path)
            if len(calls) == 2:
                path.write_bytes(b"half")
                raise error
            return real(tensors, path, **options)

        monkeypatch.setattr(safetensors, "save_file", save_file)
        return calls

    return arrange
