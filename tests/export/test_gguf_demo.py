"""A model that the demo trains answers through llama.cpp what it answers in transformers."""

from dataclasses import replace

import llama_runtime
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from sloth_plugins.demo import prepare
from sloth_plugins.demo.data import standard_library_pairs
from sloth_plugins.demo.train import IGNORED, encode
from sloth_plugins.export.gguf import export

SMALL = {"hidden": 128, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate": 352, "vocabulary": 1024}
QUICK = {"sequence": 64, "pretrain_batch": 8, "pretrain_steps": 25, "pretrain_rate": 5e-3}
QUESTIONS, TOKENS = 10, 32
# Between log-probabilities of two candidates: a difference below this is a tie.
TIE = 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo's model, fine-tuned on the demo's examples until it knows them."""
    out = tmp_path_factory.mktemp("demo")
    torch.set_num_threads(1)
    prepare.prepare(out, replace(prepare.CPU_SHAPE, **SMALL, **QUICK), "cpu")
    folder = out / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    examples = [encode(tokenizer, pair, QUICK["sequence"]) for pair in pairs()]
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3
    model.save_pretrained(folder)
    return folder


def pairs():
    short = [pair for pair in standard_library_pairs() if len(pair["instruction"] + pair["response"]) < 130]
    return short[:: len(short) // QUESTIONS][:QUESTIONS]


def prompts(tokenizer):
    for pair in pairs():
        message = [{"role": "user", "content": pair["instruction"]}]
        yield tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def margin(row, first, second):
    return float(row[first] - row[second])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["f16", "q8_0"])
def test_the_same_answers(trained, tmp_path, method):
    llama_runtime.require()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    file = export(trained, tmp_path, methods=method).files[0]
    allowed = TIE if method == "f16" else 20 * TIE
    agreed = checked = same = 0
    with llama_runtime.Llama(file) as loaded:
        for text in prompts(tokenizer):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert loaded.tokenize(text) == ids
            with torch.no_grad():
                answer = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0].tolist()
                expected = model(torch.tensor([answer])).logits[0].numpy()
            found = loaded.logits(answer)
            for at in range(len(ids) - 1, len(answer) - 1):
                there, here = int(np.argmax(expected[at])), int(np.argmax(found[at]))
                assert there == here or margin(expected[at], there, here) < allowed
                agreed, checked = agreed + (there == here), checked + 1
            same += greedy(loaded, ids, len(answer) - len(ids), tokenizer.eos_token_id) == answer
    assert checked > 10 * QUESTIONS
    assert agreed >= 0.98 * checked
    # Word for word, but for an answer or two that turned at a tie.
    assert same >= QUESTIONS - 3


def greedy(loaded, ids, count, eos):
    """As transformers' generate without sampling; every step reads the whole text again."""
    text = list(ids)
    for _ in range(count):
        text.append(int(np.argmax(loaded.logits(text)[-1])))
        if text[-1] == eos:
            break
    return text
