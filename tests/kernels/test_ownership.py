"""The backward reuses memory in the plain case, and in no case that anybody else could notice."""

import os
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sloth_plugins.patches.kernels import ops, ownership

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter keeps references to what it is given"
)
swiglu = partial(ops.glu, activation="silu")


@pytest.fixture
def leaf():
    return torch.randn(6, 8, requires_grad=True)


class Watch:
    """Notes where the gradient that reaches a tensor lies, without holding the gradient or the tensor."""

    def __init__(self):
        self.at = []

    def gradient_of(self, tensor):
        tensor.grad_fn.register_prehook(self._note)

    def _note(self, grads):
        self.at.append(grads[0].data_ptr())


def expected_swiglu_grad(leaf):
    gate, up = leaf * 2, leaf * 3
    return torch.autograd.grad((torch.nn.functional.silu(gate) * up * 2).sum(), leaf)[0]


def run_swiglu(leaf, share=lambda gate, up, y: None, extra=lambda gate: 0.0, **backward):
    """Backward through swiglu; returns whether dgate was written into gate, and the leaf's gradient."""
    watch, gate, up = Watch(), leaf * 2, leaf * 3
    at = gate.data_ptr()
    watch.gradient_of(gate)
    y = swiglu(gate, up)
    held = share(gate, up, y)
    loss = (y * 2).sum() + extra(gate)
    del gate, up, y
    loss.backward(**backward)
    del held
    return watch.at == [at], leaf.grad


def test_plain_case_reuses_gate_and_up(leaf):
    reused, grad = run_swiglu(leaf)
    assert reused
    torch.testing.assert_close(grad, expected_swiglu_grad(leaf))


def test_second_backward_of_a_kept_graph(leaf):
    gate, up = leaf * 2, leaf * 3
    loss = (swiglu(gate, up) * 2).sum()
    del gate, up
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, expected_swiglu_grad(leaf))


HELD = {
    "python reference": lambda gate, up, y: gate,
    "in a list": lambda gate, up, y: [gate],
    "detached alias": lambda gate, up, y: gate.detach(),
    "view": lambda gate, up, y: gate.detach()[:2],
    "view with graph": lambda gate, up, y: gate.view(-1),
    "storage": lambda gate, up, y: gate.untyped_storage(),
    "numpy": lambda gate, up, y: gate.detach().numpy(),
    "dlpack": lambda gate, up, y: torch.utils.dlpack.to_dlpack(gate.detach()),
}


def as_tensor(held):
    if isinstance(held, list):
        return held[0]
    if isinstance(held, torch.UntypedStorage):
        return torch.tensor([], dtype=torch.float32).set_(held)
    if type(held).__name__ == "PyCapsule":
        return torch.utils.dlpack.from_dlpack(held)
    return torch.as_tensor(held)


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD.keys())
def test_gate_that_somebody_holds(leaf, hold):
    kept = []
    reused, grad = run_swiglu(leaf, lambda gate, up, y: kept.append(hold(gate, up, y)))
    assert not reused
    torch.testing.assert_close(grad, expected_swiglu_grad(leaf))
    values = as_tensor(kept[0]).detach().reshape(-1)
    torch.testing.assert_close(values, (leaf.detach() * 2).reshape(-1)[: values.numel()])


def test_gate_that_a_forward_hook_holds(leaf):
    kept = []
    layer = torch.nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, out: kept.append(out))
    loss = (swiglu(layer(leaf), leaf * 3) * 2).sum()
    before = kept[0].detach().clone()
    loss.backward()
    assert torch.equal(kept[0], before)


def test_gate_that_another_op_saved(leaf):
    reused, grad = run_swiglu(leaf, extra=lambda gate: (gate * gate).sum())
    assert not reused
    torch.testing.assert_close(grad, expected_swiglu_grad(leaf) + 8 * leaf.detach())


def test_gate_that_an_earlier_op_saved(leaf):
    gate, up = leaf.exp(), leaf * 3
    loss = (swiglu(gate, up) * 2).sum()
    del gate, up
    (grad,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(leaf.exp()) * (leaf * 3) * 2).sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_gate_that_retains_its_gradient(leaf):
    kept = []

    def share(gate, up, y):
        gate.retain_grad()
        kept.append(gate)

    reused, _ = run_swiglu(leaf, share)
    assert not reused
    torch.testing.assert_close(kept[0].detach(), leaf.detach() * 2)
    gate = kept[0].detach().requires_grad_()
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(gate) * (leaf * 3) * 2).sum(), gate)
    torch.testing.assert_close(kept[0].grad, expected)


def test_one_tensor_as_gate_and_up(leaf):
    x = leaf * 2
    loss = (swiglu(x, x) * 2).sum()
    del x
    (grad,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(leaf * 2) * (leaf * 2) * 2).sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_leaf_gate_is_never_written():
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    before, y = gate.detach().clone(), swiglu(gate, up)
    y.sum().backward()
    assert torch.equal(gate, before)
    assert gate.grad.data_ptr() != gate.data_ptr()


def test_operand_without_gradient_is_never_written(leaf):
    gate = torch.randn(6, 8)
    before = gate.clone()
    (swiglu(gate, leaf * 3) * 2).sum().backward()
    assert torch.equal(gate, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(leaf, reentrant):
    out = checkpoint(lambda x: swiglu(x * 2, x * 3) * 2, leaf, use_reentrant=reentrant)
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, expected_swiglu_grad(leaf))


def test_under_saved_tensors_hooks(leaf):
    kept, copies = [], []

    def pack(tensor):
        kept.append(tensor)
        copies.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i]):
        loss = (swiglu(leaf * 2, leaf * 3) * 2).sum()
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected_swiglu_grad(leaf))
    assert all(torch.equal(now, then) for now, then in zip(kept, copies, strict=True))


ONE_INPUT = {
    "glu_fused": (ops.glu_fused, lambda x: torch.nn.functional.silu(x[..., :4]) * x[..., 4:]),
    "activate": (ops.activate, torch.nn.functional.silu),
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("op", "plain"), ONE_INPUT.values(), ids=ONE_INPUT.keys())
def test_the_one_saved_tensor_is_reused_unless_held(leaf, op, plain, held):
    watch, x = Watch(), leaf * 2
    at, kept = x.data_ptr(), x.detach() if held else None
    watch.gradient_of(x)
    loss = (op(x, "silu") * 2).sum()
    del x
    loss.backward()
    assert (watch.at == [at]) is not held
    assert kept is None or torch.equal(kept, leaf.detach() * 2)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad((plain(leaf * 2) * 2).sum(), leaf)[0])


@pytest.mark.parametrize(("op", "plain"), ONE_INPUT.values(), ids=ONE_INPUT.keys())
def test_the_one_saved_tensor_of_a_kept_graph(leaf, op, plain):
    loss = (op(leaf * 2, "silu") * 2).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(first, second)


def run_norm(leaf, after=lambda y: y * 2, weight=None):
    """Backward through rms_norm; returns where dx was written, and where the gradient of y was."""
    incoming, outgoing, x = Watch(), Watch(), leaf * 2
    outgoing.gradient_of(x)
    y = ops.rms_norm(x, torch.ones(8) if weight is None else weight, 1e-6)
    incoming.gradient_of(y)
    loss = after(y)
    del x, y
    loss.sum().backward()
    return outgoing.at[0], incoming.at[0]


def expected_norm_grad(leaf, after=lambda y: y * 2):
    x = leaf * 2
    return torch.autograd.grad(after(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).sum(), leaf)[0]


def test_plain_case_reuses_the_incoming_gradient(leaf):
    # The note is taken by a hook, which the engine pays for with a reference while it runs, not later.
    written, given = run_norm(leaf)
    assert written == given
    torch.testing.assert_close(leaf.grad, expected_norm_grad(leaf), atol=1e-5, rtol=1e-4)


def test_reuse_with_a_trained_weight(leaf):
    weight = torch.ones(8, requires_grad=True)
    written, given = run_norm(leaf, weight=weight)
    assert written == given
    x = leaf.detach() * 2
    expected = (2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).sum(0)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("first", [True, False])
def test_gradient_shared_by_two_branches(leaf, first):
    w = torch.randn(6, 8, requires_grad=True)
    weights = torch.randn(6, 8)

    def after(y):
        branch = w * 1
        return ((y + branch) if first else (branch + y)) * weights

    run_norm(leaf, after)
    assert torch.equal(w.grad, weights)
    torch.testing.assert_close(leaf.grad, expected_norm_grad(leaf, lambda y: y * weights), atol=1e-5, rtol=1e-4)


def test_gradient_shared_with_an_older_branch(leaf):
    weights = torch.randn(6, 8)
    w = torch.randn(6, 8, requires_grad=True)
    branch = w * 5
    written, given = run_norm(leaf, lambda y: (y + branch) * weights)
    assert written != given
    torch.testing.assert_close(w.grad, 5 * weights)


HOOKS = {
    "tensor hook": lambda y, kept: y.register_hook(kept.append),
    "pre-hook of the node": lambda y, kept: y.grad_fn.register_prehook(lambda grads: kept.append(grads[0])),
    "alias from a hook": lambda y, kept: y.register_hook(lambda grad: kept.append(grad.detach())),
    "post-hook of the node": lambda y, kept: y.grad_fn.register_hook(
        lambda grad_inputs, grad_outputs: kept.append(grad_outputs[0])
    ),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_gradient_that_a_hook_keeps(leaf, hook):
    kept, weights = [], torch.randn(6, 8)

    def after(y):
        hook(y, kept)
        return y * weights

    run_norm(leaf, after)
    assert torch.equal(kept[0], weights)


def test_gradient_that_the_output_retains(leaf):
    kept, weights = [], torch.randn(6, 8)

    def after(y):
        y.retain_grad()
        kept.append(y)
        return y * weights

    run_norm(leaf, after)
    assert torch.equal(kept[0].grad, weights)


def test_gradient_given_by_the_caller(leaf):
    y = ops.rms_norm(leaf * 2, torch.ones(8), 1e-6)
    given = torch.randn(6, 8)
    before = given.clone()
    y.backward(given)
    assert torch.equal(given, before)


def test_gradient_captured_by_grad(leaf):
    weights = torch.randn(6, 8)
    y = ops.rms_norm(leaf * 2, torch.ones(8), 1e-6)
    captured, _ = torch.autograd.grad((y * weights).sum(), (y, leaf))
    assert torch.equal(captured, weights)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_rotary_reuses_its_gradient_unless_shared(shared, transposed):
    leaf = torch.randn(2, 3, 3, 8, requires_grad=True)
    angles, kept = torch.randn(1, 3, 8), []
    written, given = Watch(), Watch()

    def view(x):
        return x.transpose(1, 2) if transposed else x

    q, k = view(leaf * 2), view(leaf * 3)
    written.gradient_of(q)
    q_out, k_out = ops.apply_rotary(q, k, angles.cos(), angles.sin())
    if shared:
        q_out.register_hook(kept.append)
    given.gradient_of(q_out)
    loss = (q_out * q_out.detach()).sum() + (k_out * 2).sum()
    expected = q_out.detach().clone()
    del q, k, q_out, k_out
    loss.backward()
    assert (written.at == given.at) is not shared
    assert not shared or torch.equal(kept[0], expected)
    reused, leaf.grad = leaf.grad, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ownership, "_keep_graph", None)
        q_out, k_out = ops.apply_rotary(view(leaf * 2), view(leaf * 3), angles.cos(), angles.sin())
        ((q_out * expected).sum() + (k_out * 2).sum()).backward()
    assert torch.equal(reused, leaf.grad)


def test_overlapping_memory_is_not_dense():
    x = torch.randn(4, 6)
    dense = (x, x.t(), x[:1], x.view(2, 2, 6).transpose(0, 1))
    assert all(ownership._dense(t) for t in dense)
    assert not any(ownership._dense(t) for t in (x[:, :3], x[::2], x[:1].expand(4, 6), x.as_strided((3, 3), (1, 1))))


def test_unknown_torch_owns_nothing(leaf, monkeypatch):
    monkeypatch.setattr(ownership, "_keep_graph", None)
    reused, grad = run_swiglu(leaf)
    assert not reused
    torch.testing.assert_close(grad, expected_swiglu_grad(leaf))


def test_counts_that_do_not_tell_sharing_own_nothing(leaf, monkeypatch):
    monkeypatch.setattr(ownership, "_plain_counts", lambda: None)
    reused, grad = run_swiglu(leaf)
    assert not reused
    torch.testing.assert_close(grad, expected_swiglu_grad(leaf))
