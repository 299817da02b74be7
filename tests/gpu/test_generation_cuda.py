"""Decoding on a card: graphs against transformers' `generate`, rows that end, adapters that change, half precision."""

import pytest
import torch
from test_fused_blocks import FAMILIES, IDS, build, in_fp32

from sloth_plugins import patch, revert
from sloth_plugins.patches.generation import decoder, entry
from sloth_plugins.patches.kernels import reference_decoding
from sloth_plugins.patches.kernels.ops.decoding import AddedTerm, add_low_rank, decode_attention, low_rank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GREEDY = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def prompts(rows=3, width=70, seed=5):
    """Rows of unequal length, padded on the left; longer than the window."""
    ids = torch.randint(3, 96, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 7 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2).cuda(), "attention_mask": mask.cuda()}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made; None for one that could not be."""
    made = []
    captured = decoder.captured
    monkeypatch.setattr(decoder, "captured", lambda *args: (made.append(captured(*args)), made[-1])[1])
    return made


@pytest.fixture
def steps(monkeypatch):
    """The logits of each step, of calls that capture nothing."""
    kept = []
    take = decoder._Decoding._take
    monkeypatch.setattr(
        decoder._Decoding, "_take", lambda self, logits: (kept.append(logits.clone()), take(self, logits))[1]
    )
    return kept


def generate(model, given, **options):
    patch(model, "*:blocks")
    found = entry.faster(model, model.generate)(**given, **options)
    revert(model)
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_most_probable_tokens_in_fp32(family, graphs):
    model = build(family, dtype=torch.float32).eval()
    expected = model.generate(**prompts(), **GREEDY)
    found = generate(model, prompts(), **GREEDY)
    assert len(graphs) == 1
    assert graphs[0] is not None
    # Where two tokens are about as probable a rounding decides, and what follows is another text.
    assert (found == expected).float().mean() > 0.95
    assert (found[:, :75] == expected[:, :75]).all()


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
def test_half_precision_is_as_near_as_transformers(quantised, adapters, monkeypatch, steps):
    model, truth = (build(("llama", "llama"), quantised=quantised).eval() for _ in range(2))
    for given in (model, truth):
        for name, parameter in given.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapters)
    truth = in_fp32(truth)
    options = {**GREEDY, "max_new_tokens": 20}
    monkeypatch.setattr(decoder, "WORTH", 100)
    errors = [0.0, 0.0]
    for seed in range(6):
        given = prompts(rows=1, seed=seed)
        steps.clear()
        found = generate(model, given, **options)
        own = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
        assert len(steps) == 20
        for i, (logits, tokens) in enumerate(((steps, found), (own.logits, own.sequences))):
            with torch.no_grad():
                exact = truth(input_ids=tokens[:, :-1]).logits[0, 69:]
            # Each at its own text; what the prompt alone gives is of the same kernels.
            errors[i] += (torch.stack([row[0] for row in logits]) - exact)[1:].norm().item()
    assert errors[0] < 1.1 * errors[1], errors


def test_a_graph_gives_what_its_steps_give_and_rows_that_end_are_left_out(graphs, monkeypatch):
    model = build(("llama", "llama"), dtype=torch.float32).eval()
    model.get_output_embeddings().weight.data *= 8
    options = {**GREEDY, "max_new_tokens": 64, "do_sample": True, "top_k": 0}
    given = prompts(rows=9)
    torch.manual_seed(1)
    plain = generate(model, given, **options)
    ends = plain[:, 85].tolist()
    found = []
    for worth in (decoder.WORTH, 100):
        monkeypatch.setattr(decoder, "WORTH", worth)
        torch.manual_seed(1)
        found.append(generate(model, given, **{**options, "eos_token_id": ends}))
    # The second captures nothing, and rows have been left out of the first.
    assert len(graphs) > 2
    assert None not in graphs
    assert found[0].shape[1] < plain.shape[1]
    assert torch.equal(*found)
    for row, whole in zip(found[0], plain, strict=True):
        ended = [i for i in range(70, len(row)) if row[i] in ends]
        length = ended[0] + 1 if ended else len(row)
        assert torch.equal(row[:length], whole[:length])
        assert (row[length:] == 2).all()


def test_a_cache_that_grows_is_in_another_graph(graphs, monkeypatch):
    model = build(("llama", "llama"), dtype=torch.float32).eval()
    whole = generate(model, prompts(), **GREEDY)
    monkeypatch.setattr(decoder, "ROOM", 16)
    # The attention sums in other parts.
    assert (generate(model, prompts(), **GREEDY) == whole).float().mean() > 0.9
    assert len(graphs) == 1 + 3
    assert None not in graphs


def test_weights_are_read_at_each_call_and_memory_is_given_back(graphs):
    model = build(("llama", "llama"), dtype=torch.float32).eval()
    patch(model, "*:blocks")
    faster = entry.faster(model, model.generate)
    faster(**prompts(), **GREEDY)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    texts = []
    for _ in range(4):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-1.5)
        texts.append(faster(**prompts(), **GREEDY).cpu())
    assert torch.cuda.memory_allocated() <= before[0]
    assert torch.cuda.memory_reserved() <= before[1] + 2**22
    assert len(graphs) == 5
    assert len({tuple(text.flatten().tolist()) for text in texts}) == 4
    assert (texts[-1] == model.generate(**prompts(), **GREEDY).cpu()).float().mean() > 0.9


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("window", [None, 200])
def test_attention_over_a_long_cache(rows, window):
    heads, groups, dim, capacity = 8, 4, 128, 640
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(rows, heads * groups, dim, device="cuda", generator=generator).bfloat16()
    keys, values = (
        torch.randn(rows, heads, capacity, dim, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    lengths = torch.randint(0, capacity, (rows,), device="cuda", generator=generator)
    found = decode_attention(q, keys, values, lengths, dim**-0.5, window)
    truth = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    reference_decoding.decode_attention(q, keys, values, lengths, truth, dim**-0.5, window, None)
    assert (found.float() - truth).norm() <= 2**-8 * truth.norm()


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_terms_of_a_real_layer(rows, adapter):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, 14336, device="cuda", generator=generator).bfloat16()
    a, b = (torch.randn(s, device="cuda", generator=generator).to(adapter) for s in ((48, 14336), (4096, 16)))
    scales = torch.full((48,), 2.0, device="cuda")
    y = torch.randn(rows, 4096, device="cuda", generator=generator).bfloat16()
    expected = y.double() + 2.0 * x.double() @ a[16:32].double().t() @ b.double().t()
    add_low_rank(low_rank(x, a, scales), [AddedTerm(y, b, slice(16, 32))])
    assert (y.double() - expected).norm() <= 2**-8 * expected.norm()
