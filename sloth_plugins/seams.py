"""Where a model enters training: `Trainer.train`, `Accelerator.prepare`, and evaluation without training.

By then PEFT has wrapped it and TRL has attached its head, and nothing is sharded or compiled yet. And where a
trainer is made, for what has to happen before.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

Entering = tuple[Any, bool, Any]
"""A model that enters training, whether it is going to be compiled, and its trainer if that is known, else None."""
Enter = Callable[[Any, bool, Any], None]


def _models_of_trainer(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[Entering]:
    # With model_init the model at hand is thrown away; the one that is trained is prepared later.
    if getattr(trainer, "model_init", None) is None:
        yield trainer.model, bool(getattr(trainer.args, "torch_compile", False)), trainer


def _is_compiling(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    return str(getattr(getattr(plugin, "backend", None), "value", "NO")) != "NO"


def _models_to_prepare(accelerator: Any, *args: Any, **kwargs: Any) -> Iterator[Entering]:
    for model in args:
        yield model, _is_compiling(accelerator), None


def _model_to_prepare(
    accelerator: Any, model: Any, device_placement: Any = None, evaluation_mode: bool = False
) -> Iterator[Entering]:
    # Reference models, reward models and teachers are prepared so; they stay stock.
    if not evaluation_mode:
        yield model, _is_compiling(accelerator), None


# module -> class, method, who enters training by it
SEAMS: dict[str, tuple[tuple[str, str, Callable[..., Iterator[Entering]]], ...]] = {
    "transformers.trainer": (
        ("Trainer", "train", _models_of_trainer),
        ("Trainer", "evaluation_loop", _models_of_trainer),
    ),
    "accelerate.accelerator": (
        ("Accelerator", "prepare", _models_to_prepare),
        ("Accelerator", "prepare_model", _model_to_prepare),
    ),
}

# Modules with trainers whose constructors there are patches for.
TRAINERS = (
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.kto_trainer",
    "trl.trainer.reward_trainer",
    "trl.experimental.kto.kto_trainer",
    "trl.experimental.orpo.orpo_trainer",
    "trl.experimental.cpo.cpo_trainer",
)
# Modules with what trainers make for themselves, whose methods patches replace from the constructor on.
PARTS = ("trl.generation.vllm_generation",)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Translator = Callable[[Any, tuple[Any, ...], dict[str, Any]], Arguments]
"""Called with an object that is being made and the arguments of its constructor; returns those that this gets."""

_wrapped: list[tuple[type, str, Any, Any]] = []


def _wrap(owner: type, name: str, models: Callable[..., Iterator[Entering]], enter: Enter) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def seam(self: Any, *args: Any, **kwargs: Any) -> Any:
        for entering in models(self, *args, **kwargs):
            enter(*entering)
        return original(self, *args, **kwargs)

    _wrapped.append((owner, name, vars(owner).get(name), seam))
    setattr(owner, name, seam)


def open_seams(module: ModuleType, enter: Enter) -> list[str]:
    """Wrap the methods of `module` that SEAMS names, so that `enter` runs before them.

    Returns those that upstream no longer has.
    """
    missing = []
    for class_name, method, models in SEAMS[module.__name__]:
        owner: Any = getattr(module, class_name, None)
        if callable(getattr(owner, method, None)):
            _wrap(owner, method, models, enter)
        else:
            missing.append(f"{module.__name__}.{class_name}.{method}")
    return missing


def open_constructor(kind: type, translate: Translator) -> None:
    """Wrap the constructor of a class, so that it gets what `translate` makes of its arguments."""
    original: Callable[..., None] = kind.__init__  # type: ignore[misc]  # of this very class

    @functools.wraps(original)
    def seam(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = translate(self, args, kwargs)
        original(self, *args, **kwargs)

    _wrapped.append((kind, "__init__", vars(kind).get("__init__"), seam))
    kind.__init__ = seam  # type: ignore[misc]  # as long as the seams are open


def close_seams() -> None:
    """Put the methods back, unless somebody else has wrapped them since."""
    while _wrapped:
        owner, name, own, seam = _wrapped.pop()
        if vars(owner).get(name) is not seam:
            continue
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
