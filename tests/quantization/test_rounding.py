"""4-bit values chosen by what a layer computes: the format stays bitsandbytes', the output is nearer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sloth_plugins.errors import SlothError
from sloth_plugins.export import open_weights
from sloth_plugins.quantization import quantize
from sloth_plugins.quantization.measuring import rows_of
from sloth_plugins.quantization.packing import Packing
from sloth_plugins.quantization.rounding import Inputs
from sloth_plugins.quantization.rounding import rounded as rounded_together
from sloth_plugins.quantization.rounding_pass import _limited

PACKING = Packing(dtype=torch.bfloat16)


def inputs(columns, count=512, rank=8):
    """Rows whose columns go together, as those of real layers do."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(count, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
    return common + 0.3 * torch.randn(count, columns, generator=draw)


def weight_of(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()


def rounded(weight, second, packing):
    """One weight alone, by moments that are beyond doubt."""
    return rounded_together([weight], Inputs(second, torch.tensor(0.0), 1), packing)[0]


@pytest.mark.parametrize("shape", [(48, 128), (7, 192), (3, 65), (64, 100)], ids=str)
def test_the_output_is_nearer_than_that_of_the_nearest_values(shape):
    """With scales over whole rows, and with blocks that begin in one row and end in the next."""
    weight, x = weight_of(*shape), inputs(shape[1])
    packed, found = PACKING.pack(weight), rounded(weight, x.T @ x, PACKING)
    assert found.data.shape == packed.data.shape
    assert found.state is not None
    assert torch.equal(found.state.absmax, packed.state.absmax)
    errors = [(x @ (one.dequantised(weight) - weight).float().T).norm() for one in (found, packed)]
    assert errors[0] < 0.75 * errors[1]


def test_layers_that_read_the_same_inputs_are_rounded_as_each_alone():
    weights, seen = [weight_of(rows, 65) for rows in (7, 64, 1)], Inputs.of(inputs(65))
    for weight, one in zip(weights, rounded_together(weights, seen, PACKING), strict=True):
        (alone,) = rounded_together([weight], seen, PACKING)
        assert torch.equal(one.data, alone.data)
        assert torch.equal(one.dequantised(weight), alone.dequantised(weight))


def test_inputs_are_the_same_in_parts():
    whole, parts = Inputs.of(inputs(96)), Inputs.of(inputs(96)[:7])
    parts.add(inputs(96)[7:300])
    parts.add(inputs(96)[300:])
    assert parts.count == whole.count == 512
    torch.testing.assert_close(parts.second, whole.second, rtol=0, atol=1e-6 * float(whole.second.max()))
    assert parts.damping == pytest.approx(whole.damping)


def test_damping_against_the_estimator_by_its_definition():
    """Ledoit and Wolf's share of the identity, token by token in fp64."""
    x = inputs(96, count=40)
    moments = x.double().T @ x.double() / 40
    mean = moments.trace() / 96
    spread = (moments - mean * torch.eye(96)).square().sum()
    chance = sum((row[:, None] * row - moments).square().sum() for row in x.double()) / 40**2
    share = float(chance / spread)
    assert 0.01 < share < 0.5
    assert Inputs.of(x).damping == pytest.approx(share / (1 - share) * float(mean) * 40, rel=1e-3)


@pytest.mark.parametrize("count", [4, 32, 200, 1000])
@pytest.mark.parametrize(("rank", "at_most"), [(0, 1.03), (16, 0.9)], ids=["chance", "in common"])
def test_few_tokens_do_not_make_others_worse(count, rank, at_most):
    draw = torch.Generator().manual_seed(0)
    mix = 3 * torch.randn(rank, 256, generator=draw)
    seen, unseen = (
        torch.randn(n, rank, generator=draw) @ mix + torch.randn(n, 256, generator=draw) for n in (count, 4000)
    )
    weight = weight_of(64, 256)
    (found,) = rounded_together([weight], Inputs.of(seen), PACKING)
    errors = [(unseen @ (one.dequantised(weight) - weight).float().T).norm() for one in (found, PACKING.pack(weight))]
    assert errors[0] < at_most * errors[1]


def test_without_anything_in_common_each_weight_is_rounded_alone():
    weight = weight_of(32, 128)
    # With double quantisation bitsandbytes rounds to multiples of scales that are not those it stores.
    packing = Packing(dtype=torch.bfloat16, double_quant=False)
    assert torch.equal(rounded(weight, torch.eye(128), packing).data, packing.pack(weight).data)


def test_against_the_best_of_all_values():
    """A row of two weights in 16 values each: all 256 pairs."""
    weight = weight_of(32, 2)
    second = torch.tensor([[1.0, 0.9], [0.9, 1.1]])
    found = rounded(weight, second, PACKING).dequantised(weight).float()
    nearest = PACKING.pack(weight)
    # All weights are one block, whose largest has the value 1 or -1.
    values = nearest.state.code.float() * nearest.dequantised(weight).float().abs().max()

    def cost(lost):
        return ((lost @ second) * lost).sum(-1)

    exact = weight.float()
    best = cost(torch.cartesian_prod(values, values)[None] - exact[:, None]).min(1).values.sum()
    ours, alone = cost(found - exact).sum(), cost(nearest.dequantised(weight).float() - exact).sum()
    assert best * 0.99 <= ours < 1.6 * best
    assert ours < 0.7 * alone


@pytest.mark.parametrize("second", ["zeros", "one input", "as rows"])
def test_inputs_that_say_little(second):
    weight = weight_of(16, 96)
    weight[:, 64:] = 0
    x = {"zeros": torch.zeros(4, 96), "one input": torch.zeros(4, 96), "as rows": inputs(96, count=3)}[second]
    if second == "one input":
        x[:, 5] = 1
    found = rounded_together([weight], Inputs.of(x), PACKING)[0].dequantised(weight)
    assert torch.isfinite(found).all()
    lost = (x @ (found - weight).float().T).norm()
    assert lost <= (x @ (PACKING.pack(weight).dequantised(weight) - weight).float().T).norm() * 1.001 + 1e-6


@pytest.mark.parametrize("size", [1, 300, 3000])
def test_a_few_massive_tokens_do_not_decide_for_all(size):
    weight, x = weight_of(64, 256), inputs(256, count=1024)
    x[:3, 17] = size * x.std()
    found = {}
    for name, rows in (("limited", _limited(x)), ("whole", x)):
        changed = rounded(weight, rows.T @ rows, PACKING).dequantised(weight) - weight
        found[name] = (x[3:] @ changed.float().T).norm()
    nearest = (x[3:] @ (PACKING.pack(weight).dequantised(weight) - weight).float().T).norm()
    assert found["limited"] < 0.7 * nearest
    assert found["limited"] < 1.1 * found["whole"]
    assert bool(found["whole"] > nearest) is (size == 3000)


def lost(folder, model, path, rows):
    """Norm of what a linear layer's output has lost, on the inputs that it gets in the 16-bit model."""
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    seen = []
    stock.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        stock(input_ids=rows)
    weights = [open_weights(one).read(f"{path}.weight").float() for one in (folder, model)]
    return float((seen[0].float() @ (weights[0] - weights[1]).T).norm())


def test_the_checkpoint_is_one_of_bitsandbytes_and_layers_lose_less(model, tmp_path, options):
    options |= {"samples": 32, "length": 64}
    for rounding in ("nearest", "calibrated"):
        quantize(model, tmp_path / rounding, budget="0", rounding=rounding, **options)
    files = [open_weights(tmp_path / rounding) for rounding in ("nearest", "calibrated")]
    assert files[0].shapes() == files[1].shapes()
    rows = rows_of(model, "builtin", 32, 64)
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"):
        nearest, calibrated = (lost(tmp_path / one, model, path, rows) for one in ("nearest", "calibrated"))
        assert calibrated < 0.9 * nearest, path
    AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated", device_map="cpu")
    report = json.loads((tmp_path / "calibrated" / "quantization_report.json").read_text())
    assert report["rounding"] == "calibrated"


def test_a_run_that_was_interrupted_goes_on(model, tmp_path, options, monkeypatch):
    from sloth_plugins.quantization import rounding_pass

    quantize(model, tmp_path / "whole", rounding="calibrated", **options)
    done = []
    own = rounding_pass._rounded_layer

    def interrupted(streamed, index, *rest):
        if index == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        return own(streamed, index, *rest)

    monkeypatch.setattr(rounding_pass, "_rounded_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "again", rounding="calibrated", **options)
    assert not (tmp_path / "again").exists()
    done.append("interrupted")
    quantize(model, tmp_path / "again", rounding="calibrated", **options)
    assert done == [0, 1, "interrupted", 2]
    both = [open_weights(tmp_path / name) for name in ("whole", "again")]
    assert all(torch.equal(both[0].read(name), both[1].read(name)) for name in both[0].shapes())


def stops_before_shard(monkeypatch, number):
    """Let an interrupt come before a shard is written, once."""
    from sloth_plugins.export import writing

    written = []
    own = writing.save_shard

    def save(path, tensors):
        if len(written) == number:
            written.append(None)
            raise KeyboardInterrupt
        written.append(path)
        return own(path, tensors)

    monkeypatch.setattr(writing, "save_shard", save)


def test_other_text_does_not_go_on_with_values_of_the_first(model, tmp_path, options, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{number} {number * 7919 % 100003}\n" for number in range(20_000)))
    options |= {"budget": "0", "rounding": "calibrated", "shard_bytes": 20_000}
    whole = quantize(model, tmp_path / "whole", data=other, **options)
    stops_before_shard(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", **options)
    made = quantize(model, tmp_path / "out", data=other, **options)
    both = [open_weights(one.folder) for one in (whole, made)]
    assert all(torch.equal(both[0].read(name), both[1].read(name)) for name in both[0].shapes())


def test_nothing_is_left_of_passes(model, tmp_path, options):
    cache = tmp_path / "cache"
    given = {**options, "cache": cache, "rounding": "calibrated"}
    quantize(model, tmp_path / "a", budget="5%", **given)
    quantize(model, tmp_path / "b", budget="500%", **given)
    assert not [path for path in cache.rglob("*") if "rounded-" in str(path)]
    assert list(cache.glob("*/measured.json"))


def test_only_what_passes_have_left_is_forgotten(tmp_path):
    from sloth_plugins.quantization.calibration import Work
    from sloth_plugins.quantization.rounding_pass import forget

    work = Work(tmp_path / "work")
    work.write("rounded-1/entering-3", {"hidden": torch.zeros(1)})
    work.write("rounded-1/path", {"data": torch.zeros(1)})
    work.write("rounded-2/path", {"data": torch.zeros(1)})
    work.write("lora-svd-4/path", {"A": torch.zeros(1)})
    forget(work, but="rounded-2")
    assert sorted(path.parent.name for path in work.folder.rglob("*.safetensors")) == ["lora-svd-4", "rounded-2"]
    forget(work)
    assert [path.name for path in (tmp_path / "work").rglob("*.safetensors")] == ["path.safetensors"]


@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_weights_beyond_the_dtype_are_told(rounding, model, tmp_path, options):
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "broken")
    with pytest.raises(SlothError, match="choose dtype bfloat16"):
        quantize(tmp_path / "broken", tmp_path / "out", budget="0", dtype="float16", rounding=rounding, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounding": "calibratd"}, "rounding 'calibratd' is not known; did you mean 'calibrated'"),
        ({"rounding": "calibrated", "init": "svd"}, "init svd makes up for rounding nearest; leave out one of"),
    ],
    ids=["typo", "init"],
)
def test_what_there_is_not(model, tmp_path, options, given, message):
    with pytest.raises(SlothError, match=message):
        quantize(model, tmp_path / "out", **given, **options)
    assert not (tmp_path / "out").exists()
