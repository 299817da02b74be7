"""From a file to a trainer of TRL's: the data, masked, reaches the loss as it should, packed or not."""

import json

import pytest
import torch
from chat_tokenizers import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig, SFTTrainer

from sloth_plugins.data import load_rows, standardize_sharegpt, to_sharegpt, train_on_responses_only

ANSWERS = [f"ж{n} 今天 🔥" for n in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"instruction": f"λ{n} 你好", "input": "", "output": answer} for n, answer in enumerate(ANSWERS)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    dialogues = to_sharegpt(load_rows(path), conversation_extension=2, random_state=42)
    return standardize_sharegpt(dialogues)


def trainer(data, folder, name, as_text, **options):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = tokenizer(name)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(made), num_key_value_heads=2, **sizes))
    if as_text:
        data = data.map(
            lambda row: {"text": made.apply_chat_template(row["conversations"], tokenize=False)},
            remove_columns="conversations",
        )
    else:
        data = data.rename_column("conversations", "messages")
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        max_length=256,
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(network, config, train_dataset=data, eval_dataset=data, processing_class=made)


@pytest.mark.parametrize(
    ("name", "as_text", "options"),
    [
        ("chatml", True, {}),
        ("tagged", False, {}),
        ("llama-3", False, {"packing": True}),
        ("unknown", True, {"packing": True, "packing_strategy": "wrapped"}),
    ],
)
def test_the_loss_is_on_the_answers(data, tmp_path, name, as_text, options):
    made = train_on_responses_only(trainer(data, tmp_path, name, as_text, **options))
    said = []
    for batch in made.get_train_dataloader():
        assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100)).all()
        said += [made.processing_class.decode(row[row != -100]) for row in batch["labels"]]
    said = "".join(said)
    missing = [answer for answer in ANSWERS if answer not in said]
    # Wrapped packing cuts dialogues where a row is full, and an answer without its header is not seen as one.
    assert len(missing) <= (len(made.train_dataset) if options.get("packing_strategy") == "wrapped" else 0)
    assert not set("λ你好") & set(said)
    assert made.evaluate()["eval_loss"] > 0
    assert made.train().training_loss > 0


def test_the_masked_loss_is_the_mean_over_answers(data, tmp_path):
    made = train_on_responses_only(trainer(data, tmp_path, "chatml", True))
    batch = next(iter(made.get_train_dataloader()))
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = -chosen[batch["labels"][:, 1:] != -100].mean()
    torch.testing.assert_close(made.compute_loss(made.model, batch).double(), expected, rtol=1e-5, atol=1e-6)
