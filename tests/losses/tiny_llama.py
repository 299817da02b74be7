"""One tiny Llama, with upstream's forward and with the patched one, over the same parameters."""

import pytest
import torch

from sloth_plugins.patches.forwards.causal_lm import cross_entropy
from sloth_plugins.patches.losses.deferred import DeferredLogits

VOCABULARY = 97
torch.set_num_threads(1)


def llama(seed=0, dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 64, **changes})
    return LlamaForCausalLM(config).to(dtype)


def patched(model):
    """The same parameters behind the patched forward."""
    kind = type(model)

    class Patched(kind):
        forward = cross_entropy(kind.forward)

    twin = Patched.__new__(Patched)
    twin.__dict__ = model.__dict__
    return twin


def ids(rows=3, length=11, seed=1):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def labels():
    """Of `ids()`, with a prompt that is not learned and padding at the end."""
    made = ids().clone()
    made[0, :4] = made[2, -2:] = -100
    return made


def loss_and_gradients(model, loss_of):
    """A loss and the gradient of every parameter."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, loss_of, rtol=2e-6):
    """The loss and all gradients are upstream's, to a small multiple of fp32 rounding."""
    loss, grads = loss_and_gradients(patched(model), loss_of)
    expected_loss, expected = loss_and_gradients(model, loss_of)
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= rtol * expected[name].norm() + 1e-9, name


def deferred(model, **inputs):
    """The logits of a patched model, which nobody has computed."""
    logits = patched(model)(ids(), **inputs).logits
    assert isinstance(logits, DeferredLogits)
    assert logits.pending
    return logits


@pytest.fixture
def model():
    return llama()
