"""Scores of streamed layers against the whole model in float64, and hidden states against its own forward."""

import pytest
import torch
from tiny_families import KINDS, KNOWN
from tiny_models import ids, save_model
from transformers import AutoModelForCausalLM

from sloth_plugins.export.weights import open_weights
from sloth_plugins.quantization.calibration import SEED, Work, calibrate, layer_statistics
from sloth_plugins.quantization.packing import Packing
from sloth_plugins.quantization.streaming import Streamed
from sloth_plugins.quantization.truth import single_module_kl
from sloth_plugins.testing import tiny_model

CPU = torch.device("cpu")
PACKING = Packing(dtype=torch.bfloat16)


def nothing(_):
    pass


def streamed(folder, dtype=torch.float32):
    return Streamed(open_weights(folder), CPU, dtype)


def exact(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and ".layers." in f".{name}"
    }


def error_of(weight):
    rounded = weight.detach().to(torch.bfloat16)
    return PACKING.pack(rounded).dequantised(rounded).double() - rounded.double()


@pytest.fixture(scope="module")
def truth(model):
    """By linear layer: inputs and gradients [rows, tokens, width] of the drawn log-likelihood, in float64."""
    whole, seen, slopes = exact(model), {}, {}

    def watch(name):
        def forward(module, args, out):
            seen[name] = args[0].detach()
            out.register_hook(lambda grad: slopes.__setitem__(name, grad))

        return forward

    for name, module in linears(whole).items():
        module.register_forward_hook(watch(name))
    generator, found = torch.Generator().manual_seed(SEED), {}
    for row in ids():
        logs = whole(input_ids=row[None]).logits[0].log_softmax(-1)
        drawn = torch.multinomial(logs.detach().float().exp(), 1, generator=generator)
        logs.gather(-1, drawn).sum().backward()
        for name in seen:
            found.setdefault(name, []).append((seen[name], slopes[name]))
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


def test_every_score_is_that_of_the_whole_model(model, truth, tmp_path):
    work = Work(tmp_path)
    stream = streamed(model)
    calibrate(stream, ids(), PACKING, work, nothing)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["layer-0", "layer-1", "layer-2"]
    weights = linears(exact(model))
    for index in range(3):
        facts, squares = layer_statistics(work, index)
        assert list(facts) == [linear.name for linear in stream.linears[index]]
        for name, fact in facts.items():
            x, g = truth[name]
            weight = weights[name].weight.detach()
            error, count = error_of(weight), x.shape[:2].numel()
            along = (g * (x @ error.T)).sum(-1)
            expected = {
                "fisher": along.square().sum() / 2 / count,
                "sequence": along.sum(1).square().sum() / 2 / count,
                "diagonal": (error.square() @ x.square().mean((0, 1))) @ g.square().mean((0, 1)) / 2,
                "activation": (error.square() @ x.square().mean((0, 1))).sum(),
                "weight": error.square().sum(),
                "relative": error.norm() / weight.norm(),
            }
            assert fact["scores"] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=2e-3), name
            assert torch.allclose(squares[name].double(), x.square().mean((0, 1)), rtol=1e-4)
            assert fact["largest"] == pytest.approx(float(x.abs().max()), rel=1e-4)
            assert fact["channel"] == int(x.abs().amax((0, 1)).argmax())
            typical = x.square().mean((0, 1)).sqrt().median()
            assert fact["ratio"] == pytest.approx(float(x.abs().max() / typical), rel=1e-3)
            assert fact["plain_bytes"] == 2 * weight.numel()


def test_single_module_kl_is_that_of_the_whole_model(model, tmp_path):
    found = single_module_kl(streamed(model), ids(), PACKING, Work(tmp_path), nothing)
    whole = exact(model)
    expected = whole(input_ids=ids()).logits.log_softmax(-1)
    for name, module in linears(whole).items():
        kept = module.weight.data.clone()
        module.weight.data += error_of(kept)
        changed = whole(input_ids=ids()).logits.log_softmax(-1)
        module.weight.data = kept
        kl = float((expected.exp() * (expected - changed)).sum(-1).mean().detach())
        assert found[name] == pytest.approx(kl, rel=2e-3, abs=1e-9), name


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_streamed_layers_compute_what_the_model_computes(name, kind, tmp_path):
    model = tiny_model(KNOWN.architectures[name], kind).eval()
    model.save_pretrained(tmp_path)
    rows = torch.randint(3, 88, (2, 13), generator=torch.Generator().manual_seed(3))
    stream = streamed(tmp_path)
    hidden, calls = stream.embed(rows)
    with torch.no_grad():
        for index, call in enumerate(calls):
            with stream.layer(index) as layer:
                hidden = stream.call(layer, hidden, call)
        with stream.top() as top:
            found = torch.stack([top(row[None]) for row in hidden])
        expected = model(input_ids=rows).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_one_layer_is_in_memory_at_a_time(model, tmp_path, monkeypatch):
    stream, most = streamed(model), []
    real = Streamed.call

    def call(self, layer, *args):
        most.append(
            [index for index, other in enumerate(self.layers) if any(p.device == CPU for p in other.parameters())]
        )
        return real(self, layer, *args)

    monkeypatch.setattr(Streamed, "call", call)
    calibrate(stream, ids(), PACKING, Work(tmp_path), nothing)
    assert {tuple(there) for there in most} == {(0,), (1,), (2,)}
    assert all(parameter.device.type == "meta" for parameter in stream.model.parameters())


def test_a_tied_head_and_fp16_weights(tmp_path):
    save_model(tmp_path / "model", tie_word_embeddings=True, dtype=torch.float16)
    stream = streamed(tmp_path / "model")
    assert stream.outside == ["lm_head"]
    work = Work(tmp_path / "work")
    calibrate(stream, ids(), Packing(dtype=torch.float16), work, nothing)
    facts, _ = layer_statistics(work, 2)
    assert all(fact["scores"]["fisher"] > 0 for fact in facts.values())


def test_massive_inputs_are_seen_in_the_channel_where_they_are(tmp_path):
    save_model(tmp_path / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[77] *= 1024
        model.model.layers[1].mlp.down_proj.weight[:, 77] /= 1024
    model.save_pretrained(tmp_path / "model")
    work = Work(tmp_path / "work")
    calibrate(streamed(tmp_path / "model"), ids(), PACKING, work, nothing)
    facts = {name: fact for index in range(3) for name, fact in layer_statistics(work, index)[0].items()}
    massive = {name: fact["channel"] for name, fact in facts.items() if fact["ratio"] >= 100}
    assert massive == {"model.layers.1.mlp.down_proj": 77}
