"""The adapter that is trained in a real engine: what it generates is what PEFT's model would."""

import pytest

pytestmark = pytest.mark.slow
CLOSE = 1e-4


@pytest.fixture(scope="module")
def swaps(engine):
    return engine("swaps")[0]


def test_greedy_tokens_and_log_probabilities_are_those_of_the_model_after_each_swap(swaps):
    assert len(swaps["steps"]) == 3
    for distance, same in swaps["steps"]:
        assert same
        assert distance < CLOSE


def test_between_swaps_vllm_keeps_what_it_was_given(swaps):
    distance, same = swaps["without sync"]
    assert distance > 100 * CLOSE
    assert not same


def test_one_adapter_is_registered_and_its_id_is_new(swaps):
    assert swaps["registered"] == [3]


def test_the_base_is_not_changed_by_a_bit_and_adapter_tensors_are_not_shared(swaps):
    assert swaps["base"] == []
    assert swaps["aliased"] == []


def test_vllm_computes_in_the_dtype_of_the_model(swaps):
    assert swaps["dtype"] == "torch.float32"


def test_an_id_or_a_name_that_is_used_twice_is_stale(swaps):
    traps = swaps["traps"]
    for trap in ("same id", "same name"):
        assert traps[f"{trap} 0"][0] < CLOSE
        assert traps[f"{trap} 1"][0] > 100 * CLOSE


def test_a_refused_adapter_is_merged_as_trl_does_it_and_the_reason_is_said(swaps):
    distance, same = swaps["refused"]
    assert same
    assert distance < CLOSE
    assert any("model.gone cannot have an adapter in vLLM's LlamaForCausalLM" in line for line in swaps["said"])


def test_the_base_comes_back_after_somebody_has_loaded_a_merged_one(swaps):
    distance, same = swaps["after a refusal"]
    assert same
    assert distance < CLOSE


def test_an_engine_goes_on_after_revert(swaps):
    assert swaps["stock again"]
    for name in ("reverted", "reverted and synced"):
        distance, same = swaps[name]
        assert same
        assert distance < CLOSE


def test_grpo_trains_on_what_it_samples_and_stock_does_not(engine):
    stock, _ = engine("grpo", selection="")
    patched, log = engine("grpo", selection="trl,trainer:statistics")
    assert len(patched["differences"]) == len(stock["differences"]) == 2
    # TRL leaves the dtype to vLLM, which halves it, and merging writes into the base.
    assert stock["dtype"] == "torch.bfloat16"
    assert max(stock["differences"]) > 10 * CLOSE
    assert max(patched["differences"]) < CLOSE
    assert patched["base"] == []
    assert patched["adapter"] > 0
    for name in ("vllm_dtype", "vllm_lora_swap"):
        assert f"trl:{name}" in log


def test_the_time_of_giving_vllm_the_weights_is_logged(engine):
    found, _ = engine("grpo", selection="trl,trainer:statistics")
    assert len(found["seconds"]) == 2
    for entry in found["seconds"]:
        # The first step's weights may be those that the engine has started with.
        assert {"rollout", "reference", "reward", "loss", "step"} <= entry.keys()
        assert min(entry.values()) > 0
        assert sum(entry.values()) <= 2 * entry["step"] + 1e-4
    assert "sync" in found["seconds"][1]
    assert found["own"] == []


def test_grpo_on_a_layout_of_vllms_own(engine):
    with_onednn, _ = engine("grpo", selection="trl", layout="onednn")
    assert max(with_onednn["differences"]) < CLOSE
    assert any("as it is on disk, since vLLM has packed" in line for line in with_onednn["said"])


@pytest.fixture(scope="module")
def served(engine):
    return engine("served")[0]


def test_a_server_is_told_of_a_new_adapter_each_time_and_keeps_one(served):
    names = [names[1:] for names in served["served"]]
    assert [len(of_a_step) for of_a_step in names] == [1, 1]
    assert names[0] != names[1]


def test_what_a_server_samples_is_what_the_model_would(served):
    distance, same = served["greedy"]
    assert same
    assert distance < CLOSE
    assert len(served["differences"]) == 2
    assert max(served["differences"]) < CLOSE
    assert served["base"] == []


def test_files_of_an_adapter_go_when_the_next_one_is_served_and_all_with_their_owner(served):
    *files, is_folder = served["files"]
    assert is_folder
    assert len(files) == 1
    assert not served["left"]


def test_a_server_that_dies_costs_no_step(served):
    assert served["error"].startswith("the vLLM server at http://127.0.0.1")
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(served["saved"])
    assert served["same"]
