"""Unmodified TRL scripts, with the flag and without: everything that they log is the same, and what they generate."""

import dataclasses
import json
import random
import re

import pytest
from launching import WARM, launch, warm
from paths import ROOT

pytestmark = pytest.mark.slow


def assert_same(stock, patched):
    assert [entry.keys() for entry in stock] == [entry.keys() for entry in patched]
    for step, (one, other) in enumerate(zip(stock, patched, strict=True)):
        for key, value in one.items():
            # Margins are differences of log-probabilities of tens.
            assert other[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (step, key)
    losses = [entry["loss"] for entry in stock if "loss" in entry]
    assert len(losses) == 6
    return losses


@pytest.mark.parametrize(
    ("script", "line", "options"),
    [("train_dpo.py", "trl:trl_logprobs", []), ("train_orpo.py", "trl:trl_orpo", ["--checkpointing"])],
)
def test_preferences(script, line, options, tmp_path):
    stock, quiet = launch(script, tmp_path, arguments=options, through=WARM)
    patched, log = launch(script, tmp_path, flag="1", arguments=options, through=WARM)
    assert len(set(assert_same(stock, patched))) == 6
    (said,) = [text for text in log.splitlines() if line in text]
    assert said.split()[1:3] == ["1", "applied"]
    assert "sloth-plugins" not in quiet


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    """The demo's small Llama, trained for seconds on sums."""
    from sloth_plugins.demo.prepare import CPU_SHAPE, build_model, build_tokenizer, pretrain

    numbers = random.Random(1)
    sums = [(numbers.randrange(50), numbers.randrange(50)) for _ in range(2000)]
    pairs = [{"instruction": f"{left}+{right}=", "response": str(left + right)} for left, right in sums]
    shape = dataclasses.replace(CPU_SHAPE, sequence=32, pretrain_steps=40)
    tokenizer = build_tokenizer(pairs, shape.vocabulary)
    model = build_model(shape, tokenizer)
    pretrain(model, tokenizer, pairs, shape, "cpu")
    folder = tmp_path_factory.mktemp("arithmetic")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_grpo_generates_and_learns_the_same(arithmetic, tmp_path):
    stock, _ = launch("train_grpo.py", tmp_path, arguments=["--model", arithmetic], through=WARM)
    patched, log = launch("train_grpo.py", tmp_path, flag="1", arguments=["--model", arithmetic], through=WARM)
    assert patched["completions"] == stock["completions"]
    assert len(set(stock["completions"])) > 10
    assert_same(stock["logged"], patched["logged"])
    assert any(entry.get("reward_std", 0) > 0 for entry in stock["logged"])
    assert "trl:trl_logprobs" in log


SENTENCES = {
    "sft": [{"messages": [{"role": "user", "content": f"{n}+{n}="}, {"role": "assistant", "content": str(2 * n)}]}
            for n in range(32)],
    "dpo": [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(n)} for n in range(32)],
}  # fmt: skip


@pytest.mark.parametrize("name", ["sft", "dpo", "orpo", "grpo"])
def test_the_readmes_script(name, arithmetic, tmp_path):
    """As it stands there, but for the model, the data, and a machine without a GPU."""
    script = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "data.json").write_text(json.dumps(SENTENCES.get("dpo" if name == "orpo" else name, [])))
    script = script.replace("Qwen/Qwen3-0.6B", str(arithmetic))
    script = re.sub(r"load_dataset\(\"[\w/-]+\"", 'load_dataset("json", data_files="data.json"', script)
    limits = "use_cpu=True, bf16=False, max_steps=2, report_to=[], save_strategy='no', "
    script = re.sub(r"(\w+Config)\(output_dir", rf"\1({limits}output_dir", script)
    (tmp_path / "script.py").write_text(script)
    done = warm(["script.py"], tmp_path, flag="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"trl(_\w+)?:trl_\w+ +1 +applied", done.stderr)
    assert "'train_loss'" in done.stdout
