"""Adapters are PEFT's own, from the same random numbers, and what `use_gradient_checkpointing` asks for holds."""

import peft
import pytest
import torch
import transformers

from sloth_plugins import FastLanguageModel, SlothError, activation
from sloth_plugins.selection import decide

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def model(tiny):
    return FastLanguageModel.from_pretrained(str(tiny), 64)[0]


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_adapters_are_those_of_peft(tiny, model):
    adapted = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=TARGETS, lora_alpha=16, use_rslora=True, random_state=5
    )
    transformers.set_seed(5)
    stock = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tiny),
        peft.LoraConfig(r=8, target_modules=TARGETS, lora_alpha=16, use_rslora=True, task_type="CAUSAL_LM"),
    )
    assert type(adapted) is type(stock)
    found, expected = trained(adapted), trained(stock)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_targets_all_linear_layers_but_the_head(model):
    adapted = FastLanguageModel.get_peft_model(model)
    assert {name.split(".")[-4] for name in trained(adapted)} == set(TARGETS)


@pytest.mark.parametrize("targets", [None, []])
def test_no_targets_are_all_linear_layers(model, targets):
    adapted = FastLanguageModel.get_peft_model(model, target_modules=targets, task_type="CAUSAL_LM")
    assert {name.split(".")[-4] for name in trained(adapted)} == set(TARGETS)
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("how", [True, "smart", "unsloth"])
def test_checkpointing_gives_the_gradients_of_doing_without(tiny, how):
    gradients = []
    for choice in (False, how):
        model, _ = FastLanguageModel.from_pretrained(str(tiny), 64)
        adapted = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=choice).train()
        assert model.model.layers[0].gradient_checkpointing is bool(choice)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained(adapted).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    # Those of the first layer too, whose input has none.
    assert any("layers.0." in name and gradient.abs().sum() > 0 for name, gradient in gradients[1].items())


def planned():
    chosen = activation._active.selection
    patches = (("llama", "checkpointing"), ("trainer", "memory_plans"), ("llama", "rope"))
    return [decide(chosen, *patch, default=patch[1] == "rope") for patch in patches]


@pytest.mark.parametrize(
    ("flag", "how", "expected"),
    [
        (None, "smart", [True, True, True]),
        (None, True, [False, False, True]),
        ("1,-*:checkpointing", "unsloth", [False, True, True]),
        ("-llama:rope", "unsloth", [True, True, False]),
    ],
)
def test_smart_selects_the_plans_unless_the_flag_takes_them_away(model, monkeypatch, flag, how, expected):
    activation.deactivate()
    if flag is not None:
        monkeypatch.setenv("SLOTH_PLUGINS", flag)
    for _ in range(2):
        FastLanguageModel.for_training(model, use_gradient_checkpointing=how)
        decisions = planned()
        assert [decision.selected for decision in decisions] == expected
        # One that cannot run is no reason to end the run.
        assert not any(decision.named for decision in decisions)


def test_embedding_and_head_among_the_targets_are_trained_whole(model, capsys):
    adapted = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    whole = [name for name in trained(adapted) if "lora" not in name]
    assert len(whole) == 2
    assert all("modules_to_save" in name for name in whole)
    assert "embed_tokens and lm_head in target_modules" in capsys.readouterr().err


def test_loftq_is_peft_s_and_starts_from_whole_weights(tiny, model, monkeypatch):
    given = {"loftq_bits": 4, "loftq_iter": 1}
    if not torch.cuda.is_available():
        with pytest.raises(SlothError, match="on a GPU, and there is none"):
            FastLanguageModel.get_peft_model(model, loftq_config=given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    configs = []
    monkeypatch.setattr(peft, "get_peft_model", lambda model, config: configs.append(config) or model)
    monkeypatch.setattr(peft.LoraConfig, "__post_init__", lambda self: None)
    for loftq in (given, peft.LoftQConfig(**given)):
        FastLanguageModel.get_peft_model(model, loftq_config=loftq)
        assert configs[-1].init_lora_weights == "loftq"
        assert configs[-1].loftq_config == peft.LoftQConfig(**given)
    monkeypatch.undo()
    quantised, _ = FastLanguageModel.from_pretrained(str(tiny), 64, load_in_4bit=True)
    with pytest.raises(SlothError, match="loftq_config needs a model that is not quantised"):
        FastLanguageModel.get_peft_model(quantised, loftq_config=given)


def test_what_cannot_be_meant(model):
    with pytest.raises(SlothError, match="did you mean 'unsloth'"):
        FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="Unsloth")
    with pytest.raises(SlothError, match="takes a transformers model, not Linear"):
        FastLanguageModel.get_peft_model(torch.nn.Linear(2, 2))
    with pytest.raises(
        SlothError, match=r"no option 'lora_alfa', nor has PEFT's LoraConfig; did you mean 'lora_alpha'\?"
    ):
        FastLanguageModel.get_peft_model(model, lora_alfa=3)
    adapted = FastLanguageModel.get_peft_model(model)
    with pytest.raises(SlothError, match="has adapters already"):
        FastLanguageModel.get_peft_model(adapted)


def test_a_target_that_is_not_there_is_named(model, capsys):
    adapted = FastLanguageModel.get_peft_model(model, target_modules=["q_pro", "v_proj", "self_attn.o_proj"])
    told = capsys.readouterr().err
    assert "'q_pro' of target_modules is no module of LlamaForCausalLM; did you mean 'q_proj'?" in told
    assert told.count("target_modules") == 1
    found = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert found == {"v_proj", "o_proj"}


def test_modes(model):
    adapted = FastLanguageModel.get_peft_model(model)
    assert FastLanguageModel.for_inference(adapted) is adapted
    assert (adapted.training, model.config.use_cache) == (False, True)
    assert FastLanguageModel.for_training(adapted) is adapted
    assert (adapted.training, model.config.use_cache) == (True, False)
    assert model.model.layers[0].gradient_checkpointing


def test_merged_and_exported_by_name(tiny, model, tmp_path):
    adapted = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False).eval()
    for name, parameter in trained(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained_merged(tmp_path / "merged", tokenizer=adapted.sloth_tokenizer, dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-5, rtol=1e-4)
    names = ("save_pretrained_gguf", "push_to_hub_merged", "push_to_hub_gguf")
    assert all(getattr(adapted, name).args == (adapted,) for name in names)
