"""`fast_generate` gives what `generate` gives for each prompt alone."""

import types

import pytest
import torch
import transformers

from sloth_plugins import FastLanguageModel, SlothError
from sloth_plugins.loading.decoding import fast

PROMPTS = ["1+1=", "the longest of them all: 12+12=", "7"]
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny):
    model, _ = FastLanguageModel.from_pretrained(str(tiny), 64)
    # Of random weights the most probable token is always the same; larger ones have more to say.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return FastLanguageModel.for_inference(model)


@pytest.fixture(scope="module")
def alone(model):
    """What transformers' own `generate` makes of each prompt, without any padding."""
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([model.sloth_tokenizer(prompt)["input_ids"]])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        rows.append(made[0, ids.shape[1] :].tolist())
    assert len({tuple(row) for row in rows}) == len(PROMPTS)
    return rows


def test_a_batch_of_unequal_lengths(model, alone):
    texts = [model.sloth_tokenizer.decode(row, skip_special_tokens=True) for row in alone]
    assert model.fast_generate(PROMPTS, GREEDY) == texts
    assert model.fast_generate(PROMPTS[1], max_new_tokens=6, do_sample=False) == texts[1]


def test_token_ids(model, alone):
    ids = [model.sloth_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert model.fast_generate(ids, GREEDY) == alone
    assert model.fast_generate(ids[2], GREEDY) == alone[2]
    assert model.fast_generate(torch.tensor([ids[0]]), GREEDY) == alone[:1]
    padded = model.sloth_tokenizer(PROMPTS, padding=True, padding_side="right", return_tensors="pt")
    assert model.fast_generate(padded, GREEDY) == alone


def test_it_ends_with_the_end_and_at_stops(model, alone):
    _, (first, second, *_), _ = alone
    ids = model.sloth_tokenizer(PROMPTS)["input_ids"]
    assert model.fast_generate(ids, {**GREEDY, "stop_token_ids": [second]})[1] == [first, second]
    text = model.fast_generate(PROMPTS[0], GREEDY)
    middle = text[len(text) // 2]
    assert model.fast_generate(PROMPTS[0], {**GREEDY, "stop": middle}) == text[: text.index(middle)]


def test_sampling(model):
    given = {"temperature": 0.9, "top_p": 0.95, "top_k": -1, "max_tokens": 8, "seed": 3, "n": 2}
    found = model.fast_generate(PROMPTS, given)
    assert len(found) == 6
    assert len(set(found)) > 3
    assert model.fast_generate(PROMPTS, types.SimpleNamespace(**given, best_of=None)) == found
    assert model.fast_generate(PROMPTS, {**given, "seed": 4}) != found


@pytest.mark.parametrize(
    ("prompts", "params", "line"),
    [
        ("1", {"max_token": 3}, "did you mean 'max_tokens'"),
        ("1", {"presence_penalty": 0.5}, "presence_penalty=0.5, which generate"),
        ("1", 3, "has none of max_tokens"),
        ([], None, "one prompt or more"),
        ([{"role": "user", "content": "1"}], None, "apply_chat_template"),
    ],
)
def test_what_cannot_be_meant_is_one_line(model, prompts, params, line):
    with pytest.raises(SlothError, match=line) as caught:
        model.fast_generate(prompts, params)
    assert "\n" not in str(caught.value)


def test_a_model_that_trains_goes_on_training(tiny, alone):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).train()
    with pytest.raises(SlothError, match="needs tokenizer="):
        FastLanguageModel.fast_generate(model, "1", GREEDY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    assert isinstance(FastLanguageModel.fast_generate(model, "1", GREEDY, tokenizer=tokenizer), str)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("device", "selection", "decodes"),
    [
        ("cuda", None, True),
        ("cuda", "1,-trl:rollout_decoding", False),
        ("cpu", "1,-trl:rollout_decoding", False),
        ("cpu", "1", True),
        ("mps", "1", False),
    ],
)
def test_where_the_decoder_runs(device, selection, decodes, monkeypatch):
    monkeypatch.delenv("SLOTH_PLUGINS", raising=False)
    if selection is not None:
        monkeypatch.setenv("SLOTH_PLUGINS", selection)
    model = types.SimpleNamespace(device=torch.device(device), generate=object())
    if decodes:
        with pytest.raises(AttributeError, match="modules"):  # it goes on to look for patches
            fast(model).__enter__()
    else:
        with fast(model) as generate:
            assert generate is model.generate
