"""Every kind of drift that upstream has shown, simulated: a cell of the matrix catches it, by name."""

import inspect
import textwrap

import cells
import pytest
import torch
import transformers.models.gemma3.modeling_gemma3 as gemma3
import transformers.models.llama.modeling_llama as llama

import sloth_plugins
from sloth_plugins import application

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(cells, "STEPS", 2)


@pytest.fixture
def rewrite(monkeypatch, tmp_path):
    """Give upstream other source: a function of a module, or the forward of a class."""

    def rewritten(module, source, owner=None, name="forward"):
        file = tmp_path / f"{name}.py"
        file.write_text(textwrap.dedent(source))
        namespace = vars(module)
        had = namespace.get(name)
        exec(compile(file.read_text(), str(file), "exec"), namespace)
        made = namespace.pop(name)
        if had is not None:
            namespace[name] = had
        made.__module__ = module.__name__
        if owner is None:
            monkeypatch.setattr(module, name, made)
        else:
            made.__qualname__ = f"{owner.__name__}.{name}"
            monkeypatch.setattr(owner, name, made)

    return rewritten


def source_of(function):
    return textwrap.dedent(inspect.getsource(function))


def cell(patch, architecture="llama", kind="llama"):
    return cells.Matrix().run(architecture, kind, patch)


@pytest.mark.parametrize("patch", ["rms_norm", "rope", "glu", cells.TOGETHER])
def test_upstream_as_it_is_gives_green(patch):
    found = cell(patch)
    assert (found.state, found.failed, found.reason, found.diff) == ("green", [], "", "")


def test_a_removed_class(monkeypatch):
    monkeypatch.delattr(llama, "LlamaMLP")
    found = cell("glu")
    assert found.failed == ["target"]
    assert "LlamaMLP does not exist" in found.reason


def test_a_renamed_argument_of_a_function(rewrite):
    """As position_ids left the rotary function in 5.0."""
    source = source_of(llama.apply_rotary_pos_emb).replace("unsqueeze_dim", "head_axis")
    rewrite(llama, source, name="apply_rotary_pos_emb")
    found = cell("rope")
    assert found.failed == ["target"]
    assert "unsqueeze_dim" in found.reason


def test_a_new_argument_of_a_forward(rewrite):
    """As past_key_value became past_key_values."""
    source = source_of(llama.LlamaRMSNorm.forward).replace(
        "hidden_states: torch.Tensor", "hidden_states, residual=None"
    )
    rewrite(llama, source, llama.LlamaRMSNorm)
    found = cell("rms_norm")
    assert found.failed == ["signature"]
    assert "'residual'" in found.reason


def test_another_formula(rewrite):
    rewrite(
        llama, source_of(llama.LlamaRMSNorm.forward).replace("self.weight *", "(1 + self.weight) *"), llama.LlamaRMSNorm
    )
    found = cell("rms_norm")
    assert found.failed[0] == "fingerprint"
    assert {"losses", "gradients"} <= set(found.failed)
    assert "-    return self.weight * " in found.diff
    assert "+    return (1 + self.weight) * " in found.diff


def test_another_helper_of_a_forward(rewrite):
    """Gemma's norm does its work in a second method."""
    rewrite(
        gemma3,
        source_of(gemma3.Gemma3RMSNorm._norm).replace("+ self.eps", "+ 2 * self.eps"),
        gemma3.Gemma3RMSNorm,
        "_norm",
    )
    found = cell("rms_norm", "gemma3", "gemma3_text")
    assert found.failed[0] == "fingerprint"
    assert "2 * self.eps" in found.diff


def test_an_attention_that_calls_its_function_otherwise(rewrite):
    """As position_embeddings became optional and cache_position went: the body around the call has changed."""
    source = source_of(llama.LlamaAttention.forward).replace(
        "apply_rotary_pos_emb(", "(lambda *a: apply_rotary_pos_emb(*a))("
    )
    rewrite(llama, source, llama.LlamaAttention)
    found = cell("rope")
    assert found.failed == ["fingerprint"]
    assert "LlamaAttention" in found.reason


def test_an_attention_that_rotates_elsewhere(rewrite):
    """What neither the deferred norms nor the blocks see must never pass."""
    lines = source_of(gemma3.Gemma3Attention.forward).splitlines()
    kept = [line for line in lines if "= apply_rotary_pos_emb(" not in line]
    assert len(kept) == len(lines) - 1
    rewrite(gemma3, "\n".join(kept), gemma3.Gemma3Attention)
    found = cell(cells.TOGETHER, "gemma3", "gemma3_text")
    assert found.state == "red"
    assert {"losses", "gradients"} <= set(found.failed)


def test_a_renamed_part(monkeypatch):
    """As Phi's projections are not Llama's."""
    init = llama.LlamaMLP.__init__

    def renamed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.w1 = self._modules.pop("gate_proj")

    monkeypatch.setattr(llama.LlamaMLP, "__init__", renamed)
    monkeypatch.setattr(llama.LlamaMLP, "forward", plain_mlp)
    assert "target" in cell("glu").failed


def plain_mlp(self, x):
    return self.down_proj(self.act_fn(self.w1(x)) * self.up_proj(x))


def test_a_renamed_config_attribute(monkeypatch):
    real = cells.Matrix._resolves

    def without(self, cell, spec, kind, patch):
        import dataclasses

        return real(self, cell, spec, kind, dataclasses.replace(patch, where={"activation_name": ("silu",)}))

    monkeypatch.setattr(cells.Matrix, "_resolves", without)
    found = cell("glu")
    assert found.failed == ["config"]
    assert "activation_name" in found.reason


def test_a_forward_that_somebody_decorates(monkeypatch):
    """As kernels from the hub take a norm's forward."""
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", plain_mlp)
    found = cell("rms_norm")
    assert found.failed == ["target"]
    assert "was replaced by" in found.reason


def test_checkpointing_that_moved(rewrite):
    """As 5.23 moved it from a layer's call into its forward: here into the MLP that is replaced."""
    rewrite(
        llama,
        """
        def forward(self, x):
            import torch.utils.checkpoint as checkpointing

            def run(x):
                return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

            return checkpointing.checkpoint(run, x, use_reentrant=False)
        """,
        llama.LlamaMLP,
    )
    found = cell("glu")
    assert found.failed[0] == "fingerprint"
    assert "checkpoint calls" in found.failed


def test_a_seam_that_moved(monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "train", Trainer.train)
    monkeypatch.setattr("sloth_plugins.seams.open_seams", lambda module, enter: [])
    found = cell("rms_norm")
    assert "application" in found.failed
    assert "no module was patched" in found.reason


def test_a_patch_that_shows_in_what_is_saved(monkeypatch):
    real = application.apply

    def leaking(wanted):
        pairs = list(wanted)
        for module, bindings in pairs:
            if bindings and "leak" not in dict(module.named_buffers()):
                module.register_buffer("leak", torch.ones(1))
        return real(pairs)

    monkeypatch.setattr(application, "apply", leaking)
    assert "save and reload" in cell("rms_norm").failed


def test_a_revert_that_forgets_one(monkeypatch):
    def forgetful(model):
        return application.apply([(module, []) for module in list(application.patched_modules(model))[1:]])

    monkeypatch.setattr(sloth_plugins.patching, "revert", forgetful)
    monkeypatch.setattr(sloth_plugins, "revert", forgetful, raising=False)
    assert cell("rms_norm").failed == ["revert"]
