"""When a layer becomes a CUDA graph: asked of stand-ins for a card, since capturing needs one (tests/gpu)."""

import types
import weakref

import pytest
import torch
from lora_models import batch, fuse, gradients, lora_model

from sloth_plugins.patches.blocks import decoder_layer, graphs


@pytest.fixture
def asked(monkeypatch):
    """The answers of `graph_for` on the CPU."""
    seen = []
    find = graphs.graph_for

    def finding(*args):
        seen.append(find(*args))
        return seen[-1]

    monkeypatch.setattr(decoder_layer, "graph_for", finding)
    return seen


def test_there_are_none_on_a_cpu(asked):
    model = lora_model()
    fuse(model)
    for _ in range(graphs.SEEN + 2):
        gradients(model, batch())
    assert len(asked) == 2 * (graphs.SEEN + 2)
    assert set(asked) == {None}


def test_a_forward_waits_for_the_backwards_of_what_was_captured_after_it():
    device = types.SimpleNamespace(waiting={})
    first, second = graphs._Token(), graphs._Token()
    device.waiting = {3: weakref.ref(first), 5: weakref.ref(second)}
    may_replay = graphs._Device.may_replay
    assert not may_replay(device, 5)
    assert not may_replay(device, 4)
    assert may_replay(device, 6)
    del second
    assert may_replay(device, 4)
    assert not may_replay(device, 3)
    del first
    assert may_replay(device, 0)
    assert device.waiting == {}


def test_a_failed_capture_is_said_and_ends_capturing(said):
    device = types.SimpleNamespace(is_broken=False)
    graphs._Device.give_up(device, RuntimeError("out of\n memory"))
    assert device.is_broken
    assert any("no CUDA graphs from here on, because capturing one failed (out of memory)" in line for line in said)


def test_bytes_are_what_a_layer_keeps():
    model = lora_model()
    fuse(model)
    runs = []
    run = decoder_layer._Fused.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_layer._Fused, "run", lambda self, *a: (runs.append(a), run(self, *a))[1])
        gradients(model, batch(2, 13))
    call, x, _ = runs[0]
    # x and mid twice (the block's input, and the graph's own copy), q, k, v, the attention's output, gate and up.
    assert graphs._bytes(call, x) == 2 * 13 * 4 * (3 * 48 + 48 + (48 + 24 + 24) + 2 * 112)
    assert torch.float32.itemsize == 4
