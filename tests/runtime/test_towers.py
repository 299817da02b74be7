"""Vision-language models: the language model is recognised and patched, the vision tower stays stock and is named."""

import json

import pytest
import torch
from launching import warm
from transformers import AutoConfig, AutoModelForImageTextToText

import sloth_plugins
from sloth_plugins.application import patched
from sloth_plugins.patches.conventions import TINY
from sloth_plugins.patches.qwen import MROPE, TINY_VL_VISION

SLOTH = ["-c", "from sloth_plugins.cli import main; main()"]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = 95
HEADS = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
LLAVA = {"vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layer": -1}
# name: (family, its settings, what the report calls the tower, how many image tokens a picture of 16x16 makes)
TOWERS = {
    "llava-llama": ("llama", "llava", {"text_config": {**TINY, "model_type": "llama"}, **LLAVA}, 4),
    "llava-mistral": ("mistral", "llava", {"text_config": {**TINY, "model_type": "mistral"}, **LLAVA}, 4),
    "gemma3": (
        "gemma",
        "gemma3",
        {
            "text_config": {**TINY, **HEADS, "model_type": "gemma3_text"},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        4,
    ),
    "qwen2_5_vl": (
        "qwen",
        "qwen2_5_vl",
        {
            "text_config": {**TINY, "rope_scaling": MROPE, "rope_parameters": MROPE},
            "vision_config": TINY_VL_VISION,
            "image_token_id": IMAGE,
        },
        0,
    ),
}


@pytest.fixture(params=TOWERS, ids=list(TOWERS))
def tower(request):
    return TOWERS[request.param]


def build(tower):
    _, kind, settings, _ = tower
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings)).train()


def gradients(model, pictures):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 88, (2, 13), generator=generator)
    given = {}
    if pictures:
        ids[:, 2 : 2 + pictures] = IMAGE
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
        if "gemma3" in type(model).__module__:
            given["token_type_ids"] = (ids == IMAGE).long()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def vision_types(model):
    found = {name: module.config.model_type for name, module in model.named_modules() if hasattr(module, "config")}
    return {kind for name, kind in found.items() if "vision" in name or "visual" in name}


def test_the_language_model_is_patched_and_the_vision_tower_is_not(tower):
    family, _, _, pictures = tower
    stock, model = build(tower), build(tower)
    report = sloth_plugins.patch(model, "1")
    by_patch = {outcome.patch: outcome for outcome in report.outcomes}
    assert {outcome.family for outcome in report.outcomes} == {family}
    assert by_patch["glu"].modules == 2
    assert by_patch["rope"].modules == 2
    seeing = [name for name, module in model.named_modules() if patched(module) and "language_model" not in name]
    assert seeing == []
    assert report.unknown == ()
    assert len(report.towers) == 1
    assert report.towers[0].startswith("vision tower (")
    assert any(kind in report.towers[0] for kind in vision_types(model))
    (loss, grads), (expected_loss, expected) = gradients(model, pictures), gradients(stock, pictures)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected.keys()
    if pictures:
        assert any("vision" in name for name in grads)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name
    assert sloth_plugins.revert(model) == report.changed


def test_a_plan_from_the_config_says_so_too(tower, tmp_path):
    family, _, _, _ = tower
    build(tower).config.save_pretrained(tmp_path)
    done = warm([*SLOTH, "plan", "--model", tmp_path], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{family}:glu" in done.stdout
    assert "vision tower (" in done.stdout
    assert "stays stock" in done.stdout
    done = warm([*SLOTH, "plan", "--model", tmp_path, "--json"], tmp_path)
    assert len(json.loads(done.stdout)["towers"]) == 1


def test_a_norm_of_the_same_class_in_the_vision_tower_stays_stock():
    """Qwen 2.5-VL builds both of one class."""
    model = build(TOWERS["qwen2_5_vl"])
    report = sloth_plugins.patch(model, "1")
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    by_patch = {outcome.patch: outcome for outcome in report.outcomes}
    assert by_patch["rms_norm"].modules == 5 < len(norms)


def test_it_can_be_verified(tower, tmp_path):
    from sloth_plugins.selection import parse
    from sloth_plugins.verification import verify_model

    build(tower).save_pretrained(tmp_path)
    verdict = verify_model(str(tmp_path), parse("1"), tokens=33)
    assert verdict.report.applied
    assert verdict.passed, verdict.rows[:3]
