"""What is left to TRL, and why; none of it needs vLLM."""

import types
from importlib import import_module

import peft
import pytest
import torch
import trainers
from accelerate import Accelerator
from paths import ROOT
from trl.generation.vllm_generation import VLLMGeneration

import sloth_plugins
from sloth_plugins.application import patched
from sloth_plugins.construction import outcomes_of
from sloth_plugins.patches.rollouts import dtype, installed, swap
from sloth_plugins.patches.rollouts.adapter import collect, largest_rank, obstacle
from sloth_plugins.patches.rollouts.dtype import computing_dtype
from sloth_plugins.patches.rollouts.files import AdapterFolder
from sloth_plugins.patches.rollouts.rescue import RolloutError


def adapted(**options):
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.get_peft_model(trainers.network(0), peft.LoraConfig(**given))


def rollouts(model, **options):
    given = {"enable_sleep_mode": False, "mode": "colocate", "tensor_parallel_size": 1, **options}
    accelerator = types.SimpleNamespace(distributed_type=given.pop("distributed", "DistributedType.NO"))
    return types.SimpleNamespace(model=model, accelerator=accelerator, **given)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 6}}, None),
        ({"modules_to_save": ["lm_head"]}, "the adapter has modules_to_save=['lm_head']"),
        ({"bias": "lora_only"}, "the adapter has bias='lora_only'"),
        ({"use_dora": True}, "the adapter has use_dora=True"),
        ({"lora_bias": True}, "model.layers.0.self_attn.q_proj has an adapter with a bias"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is an embedding with an adapter"),
        ({"trainable_token_indices": [1]}, "the adapter has trainable_token_indices=[1]"),
    ],
    ids=str,
)
def test_adapters_that_vllm_does_not_know(options, reason):
    found = obstacle(adapted(**options))
    assert found == reason


def test_more_than_the_adapter_or_less():
    assert obstacle(trainers.network(0)) == "LlamaForCausalLM has no PEFT adapter"
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert obstacle(model) == "base_model.model.model.norm.weight is trained too"
    model = adapted()
    model.merge_adapter()
    assert obstacle(model) == "model.layers.0.self_attn.q_proj has merged default into its weight"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_sleep_mode": True}, "sleep mode drops vLLM's base, which only TRL's own sync brings back"),
        ({"tensor_parallel_size": 2}, "it was not tested with tensor_parallel_size=2"),
        ({"distributed": "DistributedType.FSDP"}, "weights are sharded (FSDP)"),
        ({"distributed": "DistributedType.DEEPSPEED"}, "weights are sharded (DEEPSPEED)"),
    ],
    ids=str,
)
def test_rollouts_that_are_left_to_trl(options, reason):
    assert swap.refusal(rollouts(adapted(), **options)) == reason


def test_a_rank_above_vllms_maximum(monkeypatch):
    monkeypatch.setattr(swap, "untested", lambda: None)
    monkeypatch.setattr(swap, "lora_ranks", lambda: (1, 4))
    assert swap.refusal(rollouts(adapted())) is None
    assert swap.refusal(rollouts(adapted(r=5))) == "rank 5 is above vLLM's maximum, 4"


@pytest.mark.parametrize(("version", "fits"), [("0.31.0+cpu", True), ("0.30.2", False), ("0.32.0", False)])
def test_versions_of_vllm(version, fits, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", types.SimpleNamespace(__version__=version))
    found = installed.untested()
    assert found == (None if fits else f"vLLM {version} is here, and {installed.TESTED} is what was tested")


def test_the_extra_asks_for_what_was_tested():
    import tomllib

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert f"vllm{installed.TESTED}" in extra


def test_matrices_are_copies_that_hold_their_own_scaling():
    model = adapted(rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3})
    adapter, layer = collect(model), model.base_model.model.model.layers[1].self_attn
    assert adapter.rank == largest_rank(model) == 6
    for name, scaling in (("q_proj", 8 / 6), ("v_proj", 3 / 4)):
        found = [adapter.tensors[f"base_model.model.model.layers.1.self_attn.{name}.lora_{x}.weight"] for x in "AB"]
        own = [getattr(getattr(layer, name), f"lora_{x}")["default"].weight for x in "AB"]
        torch.testing.assert_close(found[1] @ found[0], scaling * own[1] @ own[0])
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(found, own, strict=True))


def test_files_go_with_their_owner_and_nothing_is_left_of_half_an_adapter(monkeypatch):
    folder, adapter = AdapterFolder(), collect(adapted())
    place = folder.path
    assert sorted(path.name for path in folder.write("one", adapter).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no room")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no room"):
        folder.write("two", adapter)
    assert [path.name for path in place.iterdir()] == ["one"]
    del folder
    assert not place.exists()


def test_the_dtype_is_that_of_most_frozen_weights_or_of_autocast():
    model = adapted()
    assert computing_dtype(model, "no") == torch.float32
    assert computing_dtype(model, "bf16") == torch.bfloat16
    assert computing_dtype(model.to(torch.float16), "bf16") == torch.float16
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.data = param.data.float()
    assert computing_dtype(model, "no") == torch.float16


def test_the_dtype_of_a_server_and_of_a_quantised_base_is_not_chosen():
    model = adapted()
    assert dtype.refusal(rollouts(model)) is None
    assert dtype.refusal(rollouts(model, mode="server")) == "a server has chosen its own dtype"
    weight = model.base_model.model.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    assert dtype.refusal(rollouts(model)).startswith("the base is quantised")


def made(model):
    return VLLMGeneration(model, Accelerator(cpu=True), trainers.tokenizer())


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)


@pytest.mark.usefixtures("without_vllm")
def test_without_vllm_one_line_says_so_and_the_swap_says_why_not():
    sloth_plugins.activate("trl")
    with pytest.raises(RolloutError, match="cannot be imported: vLLM is not available"):
        made(adapted())


@pytest.mark.usefixtures("without_vllm")
def test_a_patch_that_was_named_must_run(capsys):
    sloth_plugins.activate("trl:vllm_lora_swap")
    with pytest.raises(SystemExit) as ended:
        made(adapted())
    assert ended.value.code == 2
    assert "trl:vllm_lora_swap was asked for by name and cannot run: vLLM cannot be imported" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """Rollouts whose start does nothing, of a class that can be told from a patched one."""
    module = import_module(VLLMGeneration.__module__)
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", module.VLLMGeneration._init_vllm)
    monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(module, "LLM", lambda **options: types.SimpleNamespace(**options), raising=False)
    return made


@pytest.mark.usefixtures("without_vllm")
def test_vllm_is_told_the_dtype_the_report_says_what_else_and_revert_takes_it_back(started):
    sloth_plugins.activate("trl")
    model = adapted()
    rolling = started(model)
    assert rolling.llm.dtype == "float32"
    assert type(rolling) is not VLLMGeneration
    assert isinstance(rolling, VLLMGeneration)
    states = {outcome.patch: outcome.state for outcome in outcomes_of(types.SimpleNamespace(vllm_generation=rolling))}
    assert states == {"vllm_dtype": "applied", "vllm_lora_swap": "skipped", "rollout_rescue": "applied"}
    sloth_plugins.revert(model)
    assert type(rolling) is VLLMGeneration
    left = outcomes_of(types.SimpleNamespace(vllm_generation=rolling))
    assert [(outcome.patch, outcome.state) for outcome in left] == [("vllm_lora_swap", "skipped")]


@pytest.mark.usefixtures("without_vllm")
def test_patching_by_hand_takes_away_what_is_not_selected(started):
    sloth_plugins.activate("trl")
    model = adapted()
    rolling = started(model)
    sloth_plugins.patch(model, "trl:rollout_rescue")
    assert [binding.patch.name for binding in patched(rolling).bindings] == ["rollout_rescue"]
    sloth_plugins.patch(model, "off")
    assert type(rolling) is VLLMGeneration


def test_nothing_is_patched_while_nothing_is_active(started):
    rolling = started(adapted())
    assert type(rolling) is VLLMGeneration
    assert not hasattr(rolling.llm, "dtype")
