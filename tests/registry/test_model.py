import pytest

from sloth_plugins.registry import (
    ArchitectureSpec,
    BlockLayout,
    Experimental,
    GgufFormat,
    Patch,
    SpecError,
    Supported,
    TrainerSpec,
    Unsupported,
)

PATCH = {"name": "rms_norm", "target": "pkg.module:Norm", "replacement": "mine.norm:factory"}
LAYOUT = {
    "layer": "pkg.module:Layer",
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.o",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}


def test_a_patch_has_the_documented_defaults():
    patch = Patch(**PATCH)
    assert (patch.requires, dict(patch.where), patch.status, patch.default) == ((), {}, Supported(), True)


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"name": "RMS-Norm"}, "'RMS-Norm'"),
        ({"name": ""}, "''"),
        ({"target": "pkg.module.Norm"}, "'pkg.module.Norm'"),
        ({"target": 3}, "3"),
        ({"replacement": "nowhere"}, "'nowhere'"),
        ({"within": "no colon"}, "'no colon'"),
        ({"replaces": "pkg.module:function"}, "'pkg.module:function' is not a tuple"),
        ({"replaces": ("pkg.module",)}, "'pkg.module'"),
        ({"replaces": ("pkg.module:Class.method.more",)}, "'pkg.module:Class.method.more'"),
        ({"replaces": ("pkg.a:f|pkg.b:f",)}, "'pkg.a:f|pkg.b:f'"),
        ({"requires": "torch>=2"}, "'torch>=2'"),
        ({"requires": ("torch>>2",)}, "'torch>>2'"),
        ({"where": {"hidden_act": "silu"}}, "'silu'"),
        ({"where": {"hidden act": ("silu",)}}, "'hidden act'"),
        ({"status": "supported"}, "'supported'"),
    ],
)
def test_a_patch_that_cannot_be_meant_is_refused_with_its_value_quoted(change, quoted):
    with pytest.raises(SpecError) as caught:
        Patch(**{**PATCH, **change})
    assert quoted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_patch_is_frozen_all_the_way_down():
    conditions = {"hidden_act": ("silu",)}
    patch = Patch(**PATCH, where=conditions)
    conditions["hidden_act"] = ("gelu",)
    assert patch.where["hidden_act"] == ("silu",)
    with pytest.raises(TypeError):
        patch.where["hidden_act"] = ("gelu",)
    with pytest.raises(AttributeError):
        patch.name = "other"


@pytest.mark.parametrize("status", [Supported(), Experimental("tried on one model"), Unsupported("upstream moved it")])
def test_every_status_is_accepted(status):
    assert Patch(**PATCH, status=status).status is status


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"name": "Llama 3"}, "'Llama 3'"),
        ({"model_types": "llama"}, "'llama'"),
        ({"model_types": ()}, "()"),
        ({"patches": ("rms_norm",)}, "'rms_norm'"),
        ({"patches": (Patch(**PATCH), Patch(**PATCH))}, "'rms_norm' 2 times"),
        ({"requires": ("transformers==",)}, "'transformers=='"),
        ({"layout": {"q": "q"}}, "{'q': 'q'}"),
    ],
)
def test_an_architecture_that_cannot_be_meant_is_refused(change, quoted):
    arguments = {"name": "mine", "model_types": ("mine",), "patches": (Patch(**PATCH),), **change}
    with pytest.raises(SpecError) as caught:
        ArchitectureSpec(**arguments)
    assert quoted in str(caught.value)


@pytest.mark.parametrize("path", ["a:f", "a.b:C.m", "a.b:C", "a:f | b.c:C.m | d:g"])
def test_code_may_be_named_in_every_form(path):
    assert Patch(**PATCH, replaces=(path,)).replaces == (path,)


def test_a_trainer_spec_has_the_documented_defaults():
    spec = TrainerSpec(name="trl_orpo", patches=(Patch(**PATCH),))
    assert (spec.family, spec.requires) == ("trl_orpo", ())
    assert TrainerSpec(name="trl_orpo", family="trl", patches=()).family == "trl"
    with pytest.raises(AttributeError):
        spec.name = "other"


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"name": "TRL"}, "'TRL'"),
        ({"family": "Hugging Face"}, "'Hugging Face'"),
        ({"patches": ("orpo",)}, "'orpo'"),
        ({"patches": (Patch(**PATCH), Patch(**PATCH))}, "'rms_norm' 2 times"),
        ({"patches": (Patch(**PATCH, within="pkg.module:Attention"),)}, "within='pkg.module:Attention'"),
        ({"requires": "trl>=1"}, "'trl>=1'"),
        ({"requires": ("trl=1",)}, "'trl=1'"),
    ],
)
def test_a_trainer_spec_that_cannot_be_meant_is_refused(change, quoted):
    with pytest.raises(SpecError) as caught:
        TrainerSpec(**{"name": "trl", "patches": (Patch(**PATCH),), **change})
    assert quoted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layout_takes_separate_or_fused_projections():
    separate = BlockLayout(**LAYOUT)
    fused = {key: value for key, value in LAYOUT.items() if key not in ("q", "k", "v", "gate", "up")}
    both = BlockLayout(**fused, qkv="attn.qkv", gate_up="mlp.gate_up")
    plain_mlp = BlockLayout(**{**LAYOUT, "gate": None})
    assert (separate.qkv, both.q, plain_mlp.up) == (None, None, "mlp.up")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qkv": "attn.qkv"}, "either q, k and v, or qkv"),
        ({"q": None}, "either q, k and v, or qkv"),
        ({"q": None, "k": None, "qkv": "attn.qkv"}, "either q, k and v, or qkv"),
        ({"gate_up": "mlp.gate_up"}, "either up"),
        ({"up": None}, "either up"),
        ({"up": None, "gate_up": "mlp.gate_up"}, "either up"),
        ({"o": "attn..o"}, "'attn..o'"),
        ({"layer": "Layer"}, "'Layer'"),
        ({"activation": "relu"}, "'relu'"),
        ({"norm_cast": "never"}, "'never'"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(change, said):
    with pytest.raises(SpecError) as caught:
        BlockLayout(**{**LAYOUT, **change})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "Llama 3"}, "'Llama 3'"),
        ({"metadata": {"Sliding Window": "sliding_window"}}, "'Sliding Window'"),
        ({"metadata": {"attention.scale": "config scale"}}, "'config scale'"),
    ],
)
def test_a_format_that_cannot_be_meant_is_refused(change, said):
    with pytest.raises(SpecError) as caught:
        GgufFormat(**{"architecture": "llama", **change})
    assert said in str(caught.value)
    with pytest.raises(SpecError, match="gguf='llama' is not a GgufFormat"):
        ArchitectureSpec(name="llama", model_types=("llama",), patches=(), gguf="llama")
