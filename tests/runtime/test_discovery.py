import sys
import types

import pytest

from sloth_plugins import discovery
from sloth_plugins.discovery import Plugins
from sloth_plugins.registry import ArchitectureSpec, Environment, Patch, Plan, PlanItem, Skip, TrainerSpec, hookimpl

LLAMA = ("rms_norm", "rope", "glu", "cross_entropy", "blocks", "checkpointing")
PATCH = Patch(name="norm", target="pkg.module:Norm", replacement="pkg.norm:factory")


def spec(name="mine", model_types=("mine",), patches=(PATCH,)):
    return ArchitectureSpec(name=name, model_types=model_types, patches=patches)


def plugin(**hooks):
    module = types.ModuleType("third_party")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


class Entry:
    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"{name}:module", load


@pytest.fixture
def load(monkeypatch):
    """Plugins built from third-party entry points: name to module, or to an exception that the import raises."""

    def loaded(**entries):
        def entry(name, content):
            def load():
                if isinstance(content, BaseException):
                    raise content
                return content

            return Entry(name, load)

        found = [entry(name, content) for name, content in entries.items()]
        monkeypatch.setattr(discovery, "entry_points", lambda group: found if group == "sloth_plugins" else [])
        return Plugins()

    return loaded


def messages(plugins):
    texts = [str(problem) for problem in plugins.problems]
    assert all("\n" not in text for text in texts)
    return texts


def test_the_builtin_architectures_need_no_torch():
    sys_modules_before = set(sys.modules)
    plugins = Plugins(load_entry_points=False)
    assert plugins.catalogue()["llama"] == LLAMA
    assert not {name for name in set(sys.modules) - sys_modules_before if name.startswith("transformers")}
    assert plugins.problems == []


def test_a_third_party_architecture_is_found(load):
    plugins = load(extra=plugin(sloth_architectures=lambda: [spec()]))
    assert plugins.architecture_of(types.SimpleNamespace(model_type="mine")).name == "mine"
    assert plugins.owner("mine") == "extra"
    assert messages(plugins) == []


def test_a_plugin_that_raises_on_import_is_named_and_the_rest_work(load):
    plugins = load(broken=RuntimeError("no such\nthing"), extra=plugin(sloth_architectures=lambda: [spec()]))
    (message,) = messages(plugins)
    assert "'broken'" in message
    assert "RuntimeError: no such thing" in message
    assert set(plugins.architectures) >= {"llama", "mine"}


def test_a_plugin_that_exits_on_import_is_reported(load):
    assert "SystemExit" in messages(load(broken=SystemExit(3)))[0]


def test_an_entry_point_named_as_an_earlier_plugin_takes_nothing_away(load):
    plugins = load(llama=plugin(sloth_patches=lambda architecture: [PATCH] if architecture.name == "llama" else []))
    assert [patch.name for patch in plugins.patches("llama")] == [*LLAMA, "norm"]
    assert messages(plugins) == []


def test_one_spec_instead_of_several_is_reported_and_the_rest_stands(load):
    plugins = load(extra=plugin(sloth_architectures=lambda: spec()), more=plugin(sloth_patches=lambda: PATCH))
    assert "'ArchitectureSpec' object is not iterable" in messages(plugins)[0]
    assert any("'more'" in text and "not iterable" in text for text in messages(plugins))
    assert "llama" in plugins.architectures


def test_an_architecture_named_by_something_else_is_reported(load):
    plugins = load(extra=plugin(sloth_architecture_of=lambda config: ["llama"]))
    assert plugins.architecture_of(types.SimpleNamespace(model_type="llama")).name == "llama"
    assert "names architecture ['llama']" in messages(plugins)[0]


@pytest.mark.parametrize("change", [lambda items: items.append(3), lambda items: items.extend(list(items))])
def test_a_plan_that_is_spoilt_is_restored_and_the_plugin_named(load, change):
    plugins = load(extra=plugin(sloth_adjust_plan=lambda plan: change(plan.items)))
    plan = Plan([PlanItem(architecture="mine", patch=PATCH, selected=True)])
    plugins.adjust_plan(plan, None)
    assert [item.patch for item in plan.items] == [PATCH]
    assert "'extra' left" in messages(plugins)[0]


@pytest.mark.parametrize("name", ["llama", "other"])
def test_a_duplicate_architecture_or_model_type_names_both_plugins(load, name):
    plugins = load(extra=plugin(sloth_architectures=lambda: [spec(name, ("llama",))]))
    (message,) = messages(plugins)
    assert "'extra'" in message
    assert "plugin 'llama' already declares" in message
    assert plugins.owner("llama") == "llama"


def test_a_generator_that_raises_midway_is_reported(load):
    def architectures():
        yield spec("first", ("first",))
        yield ArchitectureSpec(name="Bad Name", model_types=("x",), patches=())

    plugins = load(extra=plugin(sloth_architectures=architectures))
    assert "SpecError: ArchitectureSpec 'Bad Name'" in messages(plugins)[0]
    assert "llama" in plugins.architectures


def test_a_misspelt_hook_and_a_wrong_argument_are_reported(load):
    misspelt = plugin(sloth_architecture=lambda: [])
    wrong = plugin(sloth_patches=lambda arch: [])
    texts = messages(load(misspelt=misspelt, wrong=wrong))
    assert any("'misspelt'" in text and "sloth_architecture" in text for text in texts)
    assert any("'wrong'" in text and "arch" in text for text in texts)


def test_something_that_is_no_spec_or_patch_is_reported(load):
    plugins = load(
        extra=plugin(sloth_architectures=lambda: ["llama"]), more=plugin(sloth_patches=lambda architecture: [3])
    )
    assert any("'llama', which is not an ArchitectureSpec" in text for text in messages(plugins))
    assert any("adds 3 to llama" in text for text in messages(plugins))


def test_patches_are_added_to_somebody_elses_architecture_once(load):
    added = Patch(name="mine", target="pkg.module:Norm", replacement="pkg.norm:factory")
    plugins = load(
        a=plugin(sloth_patches=lambda architecture: [added]),
        b=plugin(sloth_patches=lambda architecture: [added] if architecture.name == "llama" else []),
    )
    assert [patch.name for patch in plugins.patches("llama")] == [*LLAMA, "mine"]
    assert any("'mine'" in text and "'a'" in text and "'b'" in text for text in messages(plugins))


def test_an_architecture_may_be_named_by_a_plugin(load):
    plugins = load(extra=plugin(sloth_architecture_of=lambda config: "llama" if config.model_type == "kin" else None))
    assert plugins.architecture_of(types.SimpleNamespace(model_type="kin")).name == "llama"
    assert plugins.architecture_of(types.SimpleNamespace(model_type="stranger")) is None


def test_an_architecture_that_nobody_declares_falls_back_to_the_model_type(load):
    plugins = load(extra=plugin(sloth_architecture_of=lambda config: "nowhere"))
    assert plugins.architecture_of(types.SimpleNamespace(model_type="llama")).name == "llama"
    assert "'nowhere'" in messages(plugins)[0]


def test_a_hook_that_raises_at_run_time_is_reported_once_and_left_out(load):
    def refuse(patch, module, environment):
        raise KeyError("oops")

    plugins = load(extra=plugin(sloth_check=refuse))
    assert plugins.check(PATCH, object(), None) is None
    assert plugins.check(PATCH, object(), None) is None
    assert len(messages(plugins)) == 1


def test_a_check_that_answers_something_else_is_reported(load):
    plugins = load(a=plugin(sloth_check=lambda: Skip("no")), b=plugin(sloth_check=lambda patch, module: False))
    assert plugins.check(PATCH, object(), None) == Skip("no")
    assert "neither Skip nor None" in messages(plugins)[0]


def test_the_latest_plugin_answers_first_and_wrappers_are_refused(load):
    import pluggy

    module = types.ModuleType("wrapping")

    @pluggy.HookimplMarker("sloth")(wrapper=True)
    def sloth_check():
        return (yield)

    module.sloth_check = sloth_check
    plugins = load(a=plugin(sloth_check=lambda: Skip("a")), b=plugin(sloth_check=lambda: Skip("b")), wrapping=module)
    assert plugins.check(PATCH, object(), None) == Skip("b")
    assert "hook wrappers are not supported" in messages(plugins)[0]


def test_a_plan_is_adjusted_in_place(load):
    environment = Environment(
        python="3", platform="x", versions={}, devices=(), capability=None, triton="no device", rank=0, world_size=1
    )
    plugins = load(extra=plugin(sloth_adjust_plan=lambda plan, environment: plan.items.clear()))
    plan = Plan([PlanItem(architecture="mine", patch=PATCH, selected=True)])
    plugins.adjust_plan(plan, environment)
    assert plan.items == []


def test_families_can_be_named_beside_their_architectures():
    catalogue = Plugins(load_entry_points=False).catalogue()
    assert {"llama", "mistral", "ministral", "qwen", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3"} <= set(
        catalogue
    )
    assert catalogue["phi"] == (
        "rms_norm",
        "rope",
        "glu",
        "cross_entropy",
        "blocks",
        "checkpointing",
        "layer_norm",
        "mlp",
    )
    assert catalogue["phi3"] == ("rms_norm", "rope", "glu", "cross_entropy", "blocks", "checkpointing")


def test_a_plugin_adds_to_a_family(load):
    mine = ArchitectureSpec(name="qwen9", family="qwen", model_types=("qwen9",), patches=(PATCH,))
    plugins = load(extra=plugin(sloth_architectures=lambda: [mine]))
    assert messages(plugins) == []
    assert plugins.catalogue()["qwen"][-1] == "norm"
    assert plugins.architecture_of(types.SimpleNamespace(model_type="qwen9")).family == "qwen"


def trainer(name="toy_a", family="toy", patches=(PATCH,)):
    return TrainerSpec(name=name, family=family, patches=patches)


def test_trainers_can_be_named_beside_architectures(load):
    more = Patch(name="more", target="pkg.module:Other", replacement="pkg.norm:factory")
    plugins = load(extra=plugin(sloth_trainers=lambda: [trainer(), trainer("toy_b", patches=(more,))]))
    assert messages(plugins) == []
    catalogue = plugins.catalogue()
    assert (catalogue["toy"], catalogue["toy_a"], catalogue["toy_b"]) == (("norm", "more"), ("norm",), ("more",))
    assert plugins.owner("toy_b") == "extra"
    assert plugins.patches("toy_b") == (more,)
    assert "toy_a" not in plugins.architectures
    assert [spec.name for spec in plugins.specs][-2:] == ["toy_a", "toy_b"]


@pytest.mark.parametrize("name", ["toy_a", "llama"])
def test_a_trainer_whose_name_is_taken_names_both_plugins(load, name):
    plugins = load(
        a=plugin(sloth_trainers=lambda: [trainer()]), b=plugin(sloth_trainers=lambda: [trainer(name), trainer("toy_b")])
    )
    (message,) = messages(plugins)
    owner = "a" if name == "toy_a" else "llama"
    assert f"'b' declares trainer spec {name!r}, which plugin {owner!r} already declares" in message
    assert set(plugins.trainers) >= {"toy_a", "toy_b"}


def test_something_that_is_no_trainer_spec_is_reported(load):
    plugins = load(a=plugin(sloth_trainers=lambda: [spec()]), b=plugin(sloth_trainers=lambda: trainer()))
    assert any("which is not a TrainerSpec" in text for text in messages(plugins))
    assert any("'TrainerSpec' object is not iterable" in text for text in messages(plugins))
    assert "llama" in plugins.architectures
