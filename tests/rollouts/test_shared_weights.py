"""One base for the trained model and a real engine: whoever edits it, both see it."""

import pytest

pytestmark = pytest.mark.slow
CLOSE = 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_a_base_is_shared_whole_and_edits_are_seen_on_both_sides(engine, family):
    found, _ = engine("sharing", family=family)
    assert found["inside"] == found["of"] > 10
    assert found["changed"] == []
    for name in ("shared", "edit here", "edit there"):
        distance, same = found[name]
        assert same
        assert distance < CLOSE
    # Before the edit something else was said.
    assert found["edit is seen"][0] > 100 * CLOSE
    # Who merges and loads weights gets a base for each side first.
    assert found["inside then"] == 0
    assert found["loaded"][0] < CLOSE
    assert found["moved"] < 1e-6
    assert any("no longer share" in line for line in found["said"])
    assert any(f"share {found['of']} tensors of the base" in line for line in found["said"])


def test_grpo_trains_on_a_base_that_is_shared(engine):
    found, _ = engine("grpo", selection="trl,trl:vllm_shared_weights")
    assert len(found["differences"]) == 2
    assert max(found["differences"]) < CLOSE
    assert found["base"] == []
    assert found["adapter"] > 0
    assert any("share 21 tensors of the base" in line for line in found["said"])
