"""What several files of tests on a GPU share."""

import pytest
import torch


@pytest.fixture
def _on_gpu(monkeypatch):
    """Tensors are made on the GPU, and fresh memory is full of NaN, so that nothing unwritten passes."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocated

    torch.manual_seed(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()
