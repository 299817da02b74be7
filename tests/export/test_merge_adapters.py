"""Every kind of adapter, live and from its folder: the merged model computes what PEFT's does, or is refused."""

import json

import pytest
import torch
from adapted_models import LINEAR, adapt, load, logits, save_base, without
from peft import PeftModel
from tiny_families import KINDS, KNOWN, batch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from sloth_plugins.errors import SlothError
from sloth_plugins.export import merge, open_weights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# name: (base, options of LoRA, whether the merged head is the embedding)
CASES = {
    "plain": ("tied", {}, True),
    "dora": ("plain", {"use_dora": True}, False),
    "embedding": ("plain", {"target_modules": [*LINEAR, "embed_tokens"]}, False),
    "embedding of a tied model": ("tied", {"target_modules": [*LINEAR, "embed_tokens"]}, False),
    "embedding, tied on purpose": (
        "tied",
        {"target_modules": [*LINEAR, "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "dora on an embedding": ("tied", {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}, False),
    "head": ("plain", {"target_modules": [*LINEAR, "lm_head"]}, False),
    "head of a tied model": ("tied", {"target_modules": [*LINEAR, "lm_head"]}, False),
    "saved whole": ("plain", {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "both of a tied model saved whole": ("tied", {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "embedding of a tied model saved whole": ("tied", {"modules_to_save": ["embed_tokens"]}, False),
    "saved whole, tied on purpose": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "norms saved whole": ("plain", {"modules_to_save": ["input_layernorm", "norm"]}, False),
    "tokens": ("plain", {"trainable_token_indices": [3, 9]}, False),
    "tokens of a tied model": ("tied", {"trainable_token_indices": [3, 9]}, True),
    "tokens of a head": ("plain", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 5]}}, False),
    "biases of adapters": ("biased", {"lora_bias": True}, False),
    "all biases": ("biased", {"bias": "all"}, False),
    "biases of adapted layers": ("biased", {"bias": "lora_only"}, False),
    "one layer": ("plain", {"layers_to_transform": [1]}, False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    configs = {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "biased": {"attention_bias": True, "mlp_bias": True},
    }
    return {name: save_base(folder / name, dtype=torch.float32, **config) for name, config in configs.items()}


def assembled(weights):
    """A stock model of what was read."""
    model = LlamaForCausalLM(weights.config)
    shapes = weights.shapes()
    tensors = {name: weights.read(name) for name in shapes}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    missing = model.load_state_dict(tensors, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ([HEAD] if weights.config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_the_adapted_one_does(bases, tmp_path, case):
    base, options, tied = CASES[case]
    model = adapt(load(bases[base], dtype=torch.float32), **options)
    assert (logits(load(bases[base], dtype=torch.float32)) - logits(model)).abs().max() > 0.1
    if case == "embedding, tied on purpose" and not hasattr(model.get_output_embeddings(), "lora_A"):
        pytest.skip("this release of PEFT does not tie adapters")
    model.save_pretrained(tmp_path / "run")
    # Older releases of PEFT do not save all that they train.
    saved = logits(PeftModel.from_pretrained(load(bases[base], dtype=torch.float32), tmp_path / "run").eval())
    for source, expected in ((model, logits(model)), (tmp_path / "run", saved)):
        weights = open_weights(source)
        assert weights.config.tie_word_embeddings is tied
        torch.testing.assert_close(logits(assembled(weights)), expected, atol=1e-4, rtol=0)


def test_of_several_adapters_the_active_ones_are_merged(bases):
    model = adapt(load(bases["plain"], dtype=torch.float32))
    first = logits(model)
    model = adapt(model, seed=2, name="second", r=6, lora_alpha=3)
    second = logits(model)
    torch.testing.assert_close(logits(assembled(open_weights(model))), second, atol=1e-4, rtol=0)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    torch.testing.assert_close(logits(assembled(open_weights(model))), both, atol=1e-4, rtol=0)
    model.set_adapter("default")
    torch.testing.assert_close(logits(assembled(open_weights(model))), first, atol=1e-4, rtol=0)
    assert (first - second).abs().max() > 0.1 < (both - second).abs().max()


def test_several_dora_adapters_add_up_as_in_the_forward(bases):
    model = adapt(load(bases["plain"], dtype=torch.float32), use_dora=True)
    model = adapt(model, seed=2, name="second", use_dora=True)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(assembled(open_weights(model))), logits(model), atol=1e-4, rtol=0)


def test_an_adapter_that_peft_has_merged_is_not_merged_again(bases):
    model = adapt(load(bases["plain"], dtype=torch.float32), trainable_token_indices=[5])
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(assembled(open_weights(model))), expected, atol=1e-4, rtol=0)


def test_weights_that_conv1d_turns_round_are_merged(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapt(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    ids = torch.arange(7)[None]
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "run")
    for number, source in enumerate((model, tmp_path / "run")):
        out = merge(source, tmp_path / str(number), dtype="float32")
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_every_family_is_merged(tmp_path, architecture, kind):
    config = AutoConfig.for_model(kind, **KNOWN.architectures[architecture].tiny)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = adapt(load(tmp_path / "base", dtype=torch.float32), target_modules="all-linear")
    model.save_pretrained(tmp_path / "run")
    expected = model(input_ids=batch()).logits
    for number, source in enumerate((model, tmp_path / "run")):
        out = merge(source, tmp_path / str(number), dtype="float32")
        assert open_weights(out).shapes().keys() == open_weights(tmp_path / "base").shapes().keys()
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=batch()).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_model_whose_names_on_disk_are_others_is_merged(tmp_path):
    pytest.importorskip("transformers.conversion_mapping", reason="transformers 5 says how names on disk differ")
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tiny, image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny, vocab_size=64))
    )
    model.save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = adapt(model, target_modules=r".*language_model.*(q_proj|down_proj)")
    model.save_pretrained(tmp_path / "run")
    ids = torch.arange(5, 12)[None]
    expected = model(input_ids=ids).logits
    for number, source in enumerate((model, tmp_path / "run")):
        out = merge(source, tmp_path / str(number), dtype="float32")
        assert open_weights(out).shapes() == open_weights(tmp_path / "base").shapes()
        assert "language_model.model.layers.0.mlp.down_proj.weight" in open_weights(out).shapes()
        found = LlavaForConditionalGeneration.from_pretrained(out)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        four = merge(source, tmp_path / f"{number} in four bits", method="merged_4bit")
        loaded = LlavaForConditionalGeneration.from_pretrained(four, device_map="cpu")
        layer = loaded.get_submodule("model.language_model.layers.0.mlp.down_proj")
        assert type(layer).__name__ == "Linear4bit"
        merged = open_weights(out).read("language_model.model.layers.0.mlp.down_proj.weight")
        read = open_weights(four).read("language_model.model.layers.0.mlp.down_proj.weight")
        assert (read - merged).norm() < 0.12 * merged.norm()


def test_experts_that_are_joined_in_memory_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**tiny, num_key_value_heads=2, vocab_size=64, num_local_experts=2))
    if not hasattr(model.model.layers[0], "mlp") or not hasattr(model.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this release of transformers keeps experts apart")
    with pytest.raises(SlothError, match="MixtralForCausalLM joins tensors of its checkpoint in one"):
        open_weights(model)


def test_a_vocabulary_that_has_grown_is_that_of_the_merged_model(bases, tmp_path):
    model = load(bases["plain"], dtype=torch.float32)
    model.resize_token_embeddings(140)
    model = adapt(model, modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "run")
    for source in (model, tmp_path / "run"):
        weights = open_weights(source)
        assert weights.config.vocab_size == weights.shapes()[HEAD][0] == weights.shapes()[EMBEDDING][0] == 140
        torch.testing.assert_close(logits(assembled(weights)), logits(model), atol=1e-4, rtol=0)


def test_adapters_that_transformers_holds_itself_are_merged(bases):
    from peft import LoraConfig

    model = load(bases["plain"], dtype=torch.float32)
    model.add_adapter(LoraConfig(target_modules=LINEAR, init_lora_weights=False))
    torch.testing.assert_close(logits(assembled(open_weights(model))), logits(model.eval()), atol=1e-4, rtol=0)


def test_wrappers_are_seen_through(bases):
    model = adapt(load(bases["plain"], dtype=torch.float32))
    expected = open_weights(model).read(HEAD)
    assert torch.equal(open_weights(torch.compile(model)).read(HEAD), expected)
    assert open_weights(torch.nn.DataParallel(model)).shapes() == open_weights(model).shapes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base's weights"),
        ({"use_qalora": True}, "use_qalora is not understood"),
        ({"something_new": {"a": 1}}, "something_new is not understood"),
        ({"target_parameters": ["experts.down"]}, "target_parameters is not understood"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not understood"),
        ({"peft_type": "LOHA"}, "is a LOHA adapter"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS has a head that the base lacks"),
    ],
)
def test_a_folder_of_a_variant_that_is_not_understood_is_refused(bases, tmp_path, change, said):
    adapt(load(bases["plain"])).save_pretrained(tmp_path / "run")
    without(tmp_path / "run", **change)
    with pytest.raises(SlothError, match=said.replace("(", r"\(")) as refused:
        open_weights(tmp_path / "run")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", "PROMPT_TUNING"])
def test_a_live_method_that_is_not_understood_is_refused(bases, kind):
    from peft import AdaLoraConfig, LoHaConfig, PromptTuningConfig, get_peft_model

    configs = {
        "LOHA": lambda: LoHaConfig(target_modules=["q_proj"]),
        "ADALORA": lambda: AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    model = get_peft_model(load(bases["plain"]), configs[kind]())
    with pytest.raises(SlothError, match=f"adapter 'default' is a {kind} adapter; .*merge_and_unload"):
        open_weights(model)


@pytest.mark.parametrize("field", ["alora_invocation_tokens", "target_parameters"])
def test_a_live_variant_that_is_not_understood_is_refused(bases, field):
    value = {"alora_invocation_tokens": [1, 2], "target_parameters": ["mlp.down_proj.weight"]}[field]
    model = adapt(load(bases["plain"]), **{field: value, "target_modules": ["q_proj"]})
    with pytest.raises(SlothError, match="not understood"):
        open_weights(model)


def test_an_attention_of_torch_s_own_is_refused(bases):
    model = load(bases["plain"])
    model.extra = torch.nn.MultiheadAttention(8, 2)
    model = adapt(model, target_modules=["extra"])
    with pytest.raises(SlothError, match="extra is a MultiheadAttention, whose LoRA is not understood"):
        open_weights(model)


def test_a_bias_without_a_place_is_refused(bases, tmp_path):
    model = adapt(load(bases["plain"]), lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(SlothError, match="has an adapter with a bias, and no bias of its own"):
        open_weights(model)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(SlothError, match=r"q_proj\.bias, which .* does not have"):
        open_weights(tmp_path / "run")


def test_adapters_that_are_switched_off_are_asked_about(bases):
    model = adapt(load(bases["plain"]))
    with model.disable_adapter(), pytest.raises(SlothError, match="are switched off"):
        open_weights(model)


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), 3, None])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(SlothError, match="cannot export a"):
        open_weights(value)


def test_offloaded_weights_are_refused(bases):
    model = load(bases["plain"])
    model.model.norm.weight = torch.nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises(SlothError, match=r"model\.norm\.weight is not in memory"):
        open_weights(model)


def test_another_quantisation_is_refused_with_the_way_out(bases, tmp_path):
    save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlothError, match=r"is quantised by gptq; .*name the 16-bit model as the base"):
        open_weights(tmp_path / "base")
