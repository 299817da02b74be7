"""What a patched model must share its modules with: PEFT, checkpointing, output capture, hooks, compile, rivals."""

import functools
import inspect
import types
from importlib import import_module

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, attach_execution_device_hook, remove_hook_from_submodules
from models import KNOWN, anatomy, assert_close, batch, build, gradients
from peft import LoraConfig, get_peft_model

import sloth_plugins
from sloth_plugins.application import patched
from sloth_plugins.errors import SlothError

LINEAR = "all-linear"


def modules_of(model, architecture, patch_name):
    """Instances that a patch changes, in a stock or patched model."""
    patch = next(p for p in KNOWN.patches(architecture) if p.name == patch_name)
    module, _, kind = (patch.within or patch.target).partition(":")
    return [m for m in model.modules() if isinstance(m, getattr(import_module(module), kind))]


def lora(model, seed=5):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False))


def test_two_adapters_and_none(architecture):
    pair = []
    for is_patched in (False, True):
        model = lora(build(*architecture))
        torch.manual_seed(6)
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=LINEAR, init_lora_weights=False))
        if is_patched:
            assert sloth_plugins.patch(model, "1").changed > 0
        found = []
        for adapter in ("default", "second", "default"):
            model.set_adapter(adapter)
            found.append(gradients(model))
        with model.disable_adapter(), torch.no_grad():
            found.append((model(input_ids=batch()).logits, {}))
        found.append(gradients(model))
        pair.append(found)
    for stock, ours in zip(*pair, strict=True):
        assert torch.allclose(stock[0], ours[0], rtol=1e-5, atol=1e-6)
        if stock[1]:
            assert_close(ours, stock, factor=80)


def test_merging_an_adapter_into_a_patched_model(architecture):
    model = lora(build(*architecture))
    sloth_plugins.patch(model, "1")
    before = model(input_ids=batch()).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(input_ids=batch()).logits, before, rtol=1e-4, atol=1e-4)
    assert sloth_plugins.revert(merged) > 0


def test_hidden_states_and_attentions_are_still_captured(architecture):
    stock, model = build(*architecture, attn_implementation="eager"), build(*architecture, attn_implementation="eager")
    sloth_plugins.patch(model, "1")
    outputs = [m(input_ids=batch(), output_hidden_states=True, output_attentions=True) for m in (stock, model)]
    for field in ("hidden_states", "attentions"):
        expected, found = (getattr(output, field) for output in outputs)
        assert len(found) == len(expected) > 0
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    before = {name: type(module).__mro__[1] for name, module in model.named_modules() if patched(module)}
    sloth_plugins.revert(model)
    for name, module in model.named_modules():
        assert type(module) is before.get(name, type(module))
    assert_close(gradients(model), gradients(stock))


def test_a_model_that_has_captured_outputs_can_be_patched_and_reverted(architecture):
    stock, model = build(*architecture), build(*architecture)
    model(input_ids=batch(), output_hidden_states=True, output_attentions=True)
    report = sloth_plugins.patch(model, "1")
    assert all(outcome.state == "applied" and not outcome.reason for outcome in report.outcomes)
    assert_close(gradients(model), gradients(stock))
    sloth_plugins.revert(model)
    assert not any(patched(module) for module in model.modules())
    assert_close(gradients(model), gradients(stock))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_once_for_each_layer(architecture, reentrant, monkeypatch):
    """Counted at torch's own checkpoint function, whichever way upstream calls it."""
    import torch.utils.checkpoint

    counts, found = [], []
    real = torch.utils.checkpoint.checkpoint
    for is_patched in (False, True):
        calls = []

        def counting(function, *args, calls=calls, **kwargs):
            calls.append(function)
            return real(function, *args, **kwargs)

        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counting)
        for module in ("transformers.modeling_utils", "transformers.modeling_layers"):
            if hasattr(import_module(module), "checkpoint"):
                monkeypatch.setattr(f"{module}.checkpoint", counting)
        model = build(*architecture)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        if is_patched:
            assert sloth_plugins.patch(model, "1").changed > 0
        found.append(gradients(model))
        counts.append(len(calls))
    assert counts == [model.config.num_hidden_layers] * 2
    assert_close(found[1], found[0])


def test_generation_is_unchanged(architecture):
    stock, model = build(*architecture).eval(), build(*architecture).eval()
    sloth_plugins.patch(model, "1")
    arguments = {"input_ids": batch(rows=1, length=5), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**arguments), stock.generate(**arguments))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_runs_upstreams_forward_in_one_graph(architecture, when):
    if when == "after" and architecture[1] not in ("llama", "gemma3_text"):
        pytest.skip("the order is no matter of families, and compiling takes seconds")
    torch._dynamo.reset()  # the models of all tests share our forwards' code, and its recompilations are limited
    stock, model = build(*architecture), build(*architecture)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if when == "before":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        sloth_plugins.patch(compiled, "1")
    else:
        sloth_plugins.patch(model, "1")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(gradients(model), gradients(stock))
    loss = compiled(input_ids=batch(), labels=batch()).loss
    loss.backward()
    assert len(graphs) == 1
    assert torch.allclose(loss, gradients(stock)[0], rtol=1e-6)
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert not [name for name in names if "sloth" in name.lower()]
    assert sloth_plugins.revert(compiled) > 0


def test_accelerates_device_hooks_keep_working(architecture):
    """bitsandbytes models loaded with a device_map have such a hook on every module."""
    stock, model = build(*architecture), build(*architecture)
    attach_execution_device_hook(model, torch.device("cpu"))
    before = anatomy(model)
    report = sloth_plugins.patch(model, "1")
    assert all(outcome.state == "applied" and not outcome.reason for outcome in report.outcomes)
    runs = []
    for module in model.modules():
        if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook):
            hook = module._hf_hook
            real = hook.pre_forward
            hook.pre_forward = lambda m, *a, real=real, **k: (runs.append(m), real(m, *a, **k))[1]
    assert_close(gradients(model), gradients(stock))
    assert {id(m) for m in runs} >= {id(m) for m in model.modules() if patched(m)}
    sloth_plugins.revert(model)
    model.zero_grad()
    bound = [key for key in before if isinstance(key, tuple) and key[-1] in ("_old_forward", "forward")]
    now = anatomy(model)
    assert {k: v for k, v in now.items() if k not in bound} == {k: v for k, v in before.items() if k not in bound}
    sloth_plugins.patch(model, "1")
    remove_hook_from_submodules(model)
    assert_close(gradients(model), gradients(stock))
    assert sloth_plugins.revert(model) == report.changed
    assert_close(gradients(model), gradients(stock))


def function_of(module, source):
    """A function compiled in a module of that name, as a rival package's is."""
    names = {"__name__": module, "functools": functools}
    exec(source, names)
    return names["forward"]


RIVAL = "liger_kernel.transformers.functional"
foreign = function_of(RIVAL, "def forward(self, *args, **kwargs): raise NotImplementedError")


def wrapped_by_a_rival(function):
    """A rival that keeps upstream's name and module, by functools.wraps, and changes the result."""
    lines = [
        "def forward(f):",
        "    @functools.wraps(f)",
        "    def wrapper(*args, **kwargs): return f(*args, **kwargs)",
        "    return wrapper",
    ]
    source = "\n".join(lines)
    return function_of(RIVAL, source)(function)


@pytest.fixture(params=["replaced", "wrapped"])
def rival(request):
    return wrapped_by_a_rival if request.param == "wrapped" else lambda function: foreign


@pytest.fixture
def one_of_each(architecture):
    name, _ = architecture
    model = build(*architecture)
    return model, name, [p.name for p in KNOWN.patches(name)]


def test_an_instance_that_somebody_else_patched_is_left_alone_and_named(one_of_each, rival):
    model, name, patches = one_of_each
    victims = {patch: modules_of(model, name, patch)[0] for patch in patches}
    for victim in victims.values():
        victim.forward = types.MethodType(rival(type(victim).forward), victim)
    report = sloth_plugins.patch(model, "1")
    for outcome in report.outcomes:
        assert "liger_kernel" in outcome.reason
        assert outcome.modules == len(modules_of(model, name, outcome.patch)) - 1
        assert outcome.state == ("applied" if outcome.modules else "skipped")
        # The model itself has no name to be told by.
        is_below = victims[outcome.patch] is not model
        assert ("1 left alone" in outcome.reason) is (outcome.modules > 0 or is_below)
    assert not any(patched(victim) for victim in victims.values())


def test_a_class_that_somebody_else_patched_is_left_alone_and_named(one_of_each, rival, monkeypatch):
    model, name, patches = one_of_each
    for patch in patches:
        spec = next(p for p in KNOWN.patches(name) if p.name == patch)
        module, _, attribute = spec.target.partition(":")
        target = getattr(import_module(module), attribute)
        if isinstance(target, type):
            monkeypatch.setattr(target, "forward", rival(target.forward))
        else:
            monkeypatch.setattr(import_module(module), attribute, rival(target))
    report = sloth_plugins.patch(model, "1")
    assert report.changed == 0
    assert {outcome.state for outcome in report.outcomes} == {"skipped"}
    assert all("replaced by liger_kernel" in outcome.reason for outcome in report.outcomes)


def test_a_class_that_somebody_else_replaced_is_left_alone_and_named(one_of_each, monkeypatch):
    model, name, _ = one_of_each
    spec = next(p for p in KNOWN.patches(name) if p.within is None)
    module, _, attribute = spec.target.partition(":")
    rival = type("RivalNorm", (torch.nn.Module,), {"forward": foreign, "__module__": "unsloth.models"})
    monkeypatch.setattr(import_module(module), attribute, rival)
    outcome = next(o for o in sloth_plugins.patch(model, "1").outcomes if o.patch == spec.name)
    assert outcome.state == "skipped"
    assert "replaced by unsloth.models.RivalNorm" in outcome.reason


def stand_in(function):
    """What the `kernels` package makes of a decorated function."""

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    signature = inspect.signature(function)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    Func.forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    Func.__module__ = "kernels.layer.layer"
    return Func()


def test_a_function_that_the_kernels_package_wraps_is_patched_until_a_kernel_is_loaded(architecture, monkeypatch):
    name, _ = architecture
    for spec in (p for p in KNOWN.patches(name) if p.within):
        module, _, attribute = spec.target.partition(":")
        home = import_module(module)
        monkeypatch.setattr(home, attribute, stand_in(getattr(home, attribute)))
        placed = getattr(home, attribute)
        stock, model = build(*architecture), build(*architecture)
        (outcome,) = [o for o in sloth_plugins.patch(model, "1").outcomes if o.patch == spec.name]
        assert outcome.state == "applied"
        assert_close(gradients(model), gradients(stock))
        sloth_plugins.revert(model)
        assert getattr(home, attribute) is placed
        placed.forward = types.MethodType(foreign, placed)
        (outcome,) = [o for o in sloth_plugins.patch(model, "1").outcomes if o.patch == spec.name]
        assert "replaced by kernels.layer.layer" in outcome.reason


def test_a_subclass_with_its_own_forward_is_left_alone(one_of_each):
    model, name, patches = one_of_each
    victim = modules_of(model, name, patches[0])[0]
    own = type("OwnNorm", (type(victim),), {"forward": foreign, "__module__": "users.code"})
    victim.__class__ = own
    outcome = sloth_plugins.patch(model, "1").outcomes[0]
    assert "users.code.OwnNorm has its own forward" in outcome.reason
    assert type(victim) is own


def test_a_named_patch_that_cannot_run_is_an_error_and_changes_nothing(one_of_each, monkeypatch):
    model, name, _ = one_of_each
    spec = KNOWN.patches(name)[0]
    module, _, attribute = spec.target.partition(":")
    monkeypatch.setattr(getattr(import_module(module), attribute), "forward", foreign)
    before = anatomy(model)
    with pytest.raises(
        SlothError, match=f"{KNOWN.architectures[name].family}:{spec.name} was asked for by name and cannot run"
    ):
        sloth_plugins.patch(model, f"{name}:{spec.name}")
    assert anatomy(model) == before
    assert sloth_plugins.patch(model, name).changed > 0


def test_hooks_on_patched_modules_still_run(one_of_each):
    model, name, patches = one_of_each
    seen = []
    handles = [
        modules_of(model, name, patch)[0].register_forward_hook(lambda m, a, o, patch=patch: seen.append(patch))
        for patch in patches
    ]
    sloth_plugins.patch(model, "1")
    gradients(model)
    assert sorted(seen) == sorted(patches)
    for handle in handles:
        handle.remove()


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *a: seen.append(1)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *a: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *a: seen.append(1)),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *a: seen.append(1)),
    "global": lambda module, seen: torch.nn.modules.module.register_module_forward_hook(
        lambda m, *a: seen.append(1) if m is module else None
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_modules_that_a_patch_would_pass_over_still_run(architecture, kind):
    model = build(*architecture)
    inner = [m for m in model.modules() if "SiLU" in type(m).__name__ or "GELU" in type(m).__name__]
    seen = []
    handles = [HOOKS[kind](module, seen) for module in inner]
    sloth_plugins.patch(model, "1")
    gradients(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(inner) > 0


def test_a_parametrized_module_is_left_alone(one_of_each):
    model, name, patches = one_of_each
    norm = modules_of(model, name, patches[0])[0]
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    outcome = sloth_plugins.patch(model, "1").outcomes[0]
    assert "parametrized" in outcome.reason
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert "left alone" not in sloth_plugins.patch(model, "1").outcomes[0].reason


def test_models_of_one_architecture_with_different_configs(architecture):
    name, kind = architecture
    attributes = {key for patch in KNOWN.patches(name) for key in patch.where}
    assert attributes
    plain, other = build(name, kind), build(name, kind, **dict.fromkeys(attributes, "relu"))
    for pair in ((plain, other), (other, plain)):
        both = torch.nn.ModuleList(pair)
        outcomes = {o.patch: o for o in sloth_plugins.patch(both, "1").outcomes}
        narrow = [p.name for p in KNOWN.patches(name) if p.where]
        assert all(outcomes[patch].state == "skipped" and "found relu" in outcomes[patch].reason for patch in narrow)
        assert sloth_plugins.revert(both) > 0


def test_signatures_are_upstreams(architecture):
    stock, model = build(*architecture), build(*architecture)
    sloth_plugins.patch(model, "1")
    for (name, a), (_, b) in zip(stock.named_modules(), model.named_modules(), strict=True):
        assert inspect.signature(a.forward) == inspect.signature(b.forward), name


def test_a_sharding_wrapper_derived_from_a_patched_class(architecture):
    """FSDP2 gives each module a class of its own, derived from the one it finds."""
    model = build(*architecture)
    report = sloth_plugins.patch(model, "1")
    wrapped = next(module for module in model.modules() if patched(module))
    wrapped.__class__ = type("FSDP" + type(wrapped).__name__, (type(wrapped),), {})
    again = sloth_plugins.patch(model, "1")
    assert [o.modules for o in again.outcomes] == [o.modules for o in report.outcomes]
    assert again.changed == 0
    with pytest.raises(SlothError, match="was changed after it was patched"):
        sloth_plugins.revert(model)
    assert sum(patched(module) is not None for module in model.modules()) == report.changed


def test_partial_and_vmap_callers_get_upstreams_path(architecture):
    """Transforms of torch.func see every op, so the fused functions step aside."""
    model, stock = build(*architecture), build(*architecture)
    sloth_plugins.patch(model, "1")
    ids = batch(rows=1, length=4)
    outputs = []
    for network in (stock, model):
        parameters = dict(network.named_parameters())

        def loss(values, network=network):
            return torch.func.functional_call(network, values, (ids,), {"use_cache": False}).logits.sum()

        outputs.append(torch.func.grad(loss)(parameters))
    for name, grad in outputs[0].items():
        assert torch.allclose(grad, outputs[1][name], rtol=1e-4, atol=1e-5), name
