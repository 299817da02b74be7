"""Decoded tokens are those of transformers' `generate`, for every family and way to sample."""

import pytest
import torch
import transformers
from lora_models import FAMILIES, fuse, lora_model

from sloth_plugins import patch, revert
from sloth_plugins.patches.generation import decoder
from sloth_plugins.patches.generation.entry import faster

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 0}


def prompts(rows=3, width=9):
    """Rows of unequal length, padded on the left."""
    ids = torch.randint(3, 96, (rows, width), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


def generating(*args, **kwargs):
    """A tiny model as it is before it generates."""
    return lora_model(*args, **kwargs).eval()


def both(model, seed=1, given=None, **options):
    """What transformers generates, and what a patched model does."""
    given = prompts() if given is None else given
    torch.manual_seed(seed)
    expected = model.generate(**given, **options)
    fuse(model)
    torch.manual_seed(seed)
    found = faster(model, model.generate)(**given, **options)
    revert(model)
    return found, expected


@pytest.mark.parametrize(("architecture", "kind"), FAMILIES)
def test_most_probable_tokens(architecture, kind, decoded, said):
    model = generating(architecture, kind)
    # A prompt longer than the window, and rows that begin within it.
    found, expected = both(model, **GREEDY)
    assert len(decoded) == 1
    assert not said
    assert torch.equal(found, expected)
    assert len(expected[:, 9:].unique()) > 2


@pytest.fixture(scope="module")
def llama():
    model = generating()
    # Of random weights all tokens are about as probable.
    model.get_output_embeddings().weight.data *= 20
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
        {"num_return_sequences": 3},
        {"eos_token_id": list(range(3, 50)), "min_new_tokens": 4},
        {"eos_token_id": [80, 45], "pad_token_id": None},
    ],
    ids=str,
)
def test_drawn_tokens_are_those_of_the_same_random_numbers(llama, options, decoded):
    found, expected = both(llama, **{**SAMPLED, **options})
    assert len(decoded) == 1
    assert torch.equal(found, expected)
    plain, _ = both(llama, **SAMPLED)
    assert not torch.equal(found, plain)


def test_rows_that_end_are_left_out(llama, decoded, batch_sizes):
    given = prompts(rows=6, width=11)
    plain, _ = both(llama, given=given, **{**SAMPLED, "max_new_tokens": 20})
    ends = plain[:3, 16].tolist()
    batch_sizes.clear()
    found, expected = both(llama, given=given, **{**SAMPLED, "max_new_tokens": 20, "eos_token_id": ends})
    assert torch.equal(found, expected)
    assert len(decoded) == 2
    # Six rows, then three or less, and no step for nobody.
    assert batch_sizes[0] == 6
    assert batch_sizes[-1] <= 3
    assert len(batch_sizes) == found.shape[1] - 11 - 1


@pytest.mark.parametrize("room", [1, 5])
@pytest.mark.parametrize("family", [("llama", "llama"), ("gemma3", "gemma3_text")], ids=str)
def test_the_cache_grows_with_the_rows(family, room, decoded, monkeypatch):
    """It has room for a few tokens first, since rows may end long before they must."""
    made = []
    zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, *args: (made.append(args[0][2]), zeros(self, *args))[1])
    monkeypatch.setattr(decoder, "ROOM", room)
    model = generating(*family)
    model.get_output_embeddings().weight.data *= 20
    ends = both(model, **SAMPLED)[1][:2, 13].tolist()
    grown = len(set(made))
    assert grown == -(-11 // room) - 1
    found, expected = both(model, **{**SAMPLED, "eos_token_id": ends})
    assert torch.equal(found, expected)
    assert len(decoded) == 2


def test_all_rows_may_end_at_once(llama, decoded):
    for ends in (list(range(96)), [int(both(llama, **GREEDY)[1][0, 9])]):
        found, expected = both(llama, **{**GREEDY, "eos_token_id": ends})
        assert torch.equal(found, expected)
    assert len(decoded) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": "off"},
        {"adapters": "some", "rank_pattern": {"v_proj": 7, "up_proj": 1}, "alpha_pattern": {"down_proj": 9}},
        {"adapters": "none"},
        {"adapters": "trained", "modules_to_save": ["lm_head"]},
    ],
    ids=lambda changes: changes["adapters"],
)
def test_adapters(changes, decoded):
    kind = changes.pop("adapters")
    chosen = ["v_proj", "up_proj", "down_proj"] if kind == "some" else "all-linear"
    model = generating(target_modules=chosen, **changes)
    if kind == "none":
        # Full fine-tuning: base weights are trained.
        model = model.unload().requires_grad_(True)
        patch(model, "*:blocks")
        found = faster(model, model.generate)(**prompts(), **GREEDY)
        assert torch.equal(found, revert(model) and model.generate(**prompts(), **GREEDY))
    elif kind == "off":
        with_adapters, _ = both(model, **GREEDY)
        with model.disable_adapter():
            found, expected = both(model, **GREEDY)
        assert torch.equal(found, expected)
        assert not torch.equal(found, with_adapters)
    else:
        found, expected = both(model, **GREEDY)
        assert torch.equal(found, expected)
    assert decoded


def test_weights_are_read_at_each_call(llama, decoded):
    fuse(llama)
    generate = faster(llama, llama.generate)
    before = generate(**prompts(), **GREEDY)
    weight = next(p for n, p in llama.named_parameters() if "lora_B" in n)
    kept = weight.detach().clone()
    for change in (lambda: weight.data.mul_(-3), lambda: setattr(weight, "data", kept * 5)):
        change()
        found = generate(**prompts(), **GREEDY)
        assert not torch.equal(found, before)
        assert torch.equal(found, llama.generate(**prompts(), **GREEDY))
        before = found
    weight.data = kept
    revert(llama)
    assert len(decoded) == 3


@pytest.mark.parametrize("adapters", ["float32", "bfloat16"])
def test_half_precision_is_as_near_as_transformers(adapters, monkeypatch, decoded):
    """Logits of each step against float64: no farther than `generate`'s own."""
    from sloth_plugins.patches.generation import decoder

    model = generating(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, adapters))
    fuse(model)
    kept = []
    take = decoder._Decoding._take
    monkeypatch.setattr(
        decoder._Decoding, "_take", lambda self, logits: (kept.append(logits.clone()), take(self, logits))[1]
    )
    given = {name: t[:1] for name, t in prompts().items()}
    found = faster(model, model.generate)(**given, **GREEDY)
    revert(model)
    own = model.generate(**given, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert len(decoded) == 1
    # Both are held to the truth of their own text.
    ours = torch.stack([logits[0] for logits in kept]).double()
    theirs = torch.stack([logits[0] for logits in own.logits]).double()
    wide = model.double()
    with torch.no_grad():
        errors = [
            (logits - wide(input_ids=tokens[:, :-1]).logits[0, 8:]).norm().item()
            for logits, tokens in ((ours, found), (theirs, own.sequences))
        ]
    assert errors[0] <= 1.2 * errors[1]


def test_autocast_is_that_of_the_forward(decoded):
    """As accelerate wraps a model that it prepares: only the forward runs in half precision."""
    model = generating().unload()
    plain = model.forward
    patch(model, "*:blocks")

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = forward
    found = faster(model, model.generate)(**prompts(), **{**GREEDY, "max_new_tokens": 3})
    expected = model.generate(**prompts(), **{**GREEDY, "max_new_tokens": 3})
    assert len(decoded) == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2 is set"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 is set"),
        ({"use_cache": False}, "use_cache=False is set"),
        ({"max_new_tokens": None, "max_length": 12}, "max_new_tokens is not given"),
        ({"logits_processor": [transformers.TemperatureLogitsWarper(2.0)]}, "logits_processor is given"),
        ({"suppress_tokens": [4]}, "suppress_tokens=[4] is set"),
        ({"output_scores": True, "return_dict_in_generate": True}, "is set"),
        ({"typical_p": 0.9}, "typical_p=0.9 is set"),
    ],
    # Not of the values: an object's address differs between the processes that share the tests.
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_what_is_not_known_is_left_to_transformers(llama, options, reason, decoded, said):
    given = {name: value for name, value in {**GREEDY, **options}.items() if value is not None}
    given |= {"eos_token_id": 1}
    found, expected = both(llama, **given)
    assert not decoded
    assert any(reason in line for line in said)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)


def sharded(layer):
    """As `fully_shard` leaves it, but whole."""
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer), type("FSDPModule", (), {})), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "dropout in its adapters"),
        (lambda model: model.merge_adapter(), "is merged"),
        (lambda model: model.base_model.model.model.layers[1].mlp.register_forward_hook(print), "has hooks"),
        (lambda model: revert(model.base_model.model.model.layers[1]), "1 of its 2 layers are patched"),
        (lambda model: sharded(model.base_model.model.model.layers[0]), "sharded over processes"),
        (lambda model: setattr(model.get_input_embeddings().weight, "ds_id", 0), "sharded over processes"),
    ],
    ids=["dropout", "merged", "hook", "one layer stock", "fsdp", "deepspeed"],
)
def test_what_cannot_be_decoded_is_left_to_transformers(change, reason, decoded, said, capsys):
    model = generating(lora_dropout=0.1)
    fuse(model)
    change(model)
    torch.manual_seed(3)
    found = faster(model, model.generate)(**prompts(), **GREEDY)
    torch.manual_seed(3)
    assert torch.equal(found, model.generate(**prompts(), **GREEDY))
    assert not decoded
    assert any(reason in line for line in said)


def test_padding_on_the_right_is_left_to_transformers(llama, decoded, said):
    given = {name: t.flip(1) for name, t in prompts().items()}
    both(llama, given=given, **GREEDY)
    assert not decoded
    assert any("padding on the left" in line for line in said)
