"""Where a model enters training: `Trainer.train`, `Accelerator.prepare`, and evaluation without training.

By then PEFT has wrapped it and TRL has attached its head, and nothing is sharded or compiled yet.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

Enter = Callable[[Any], None]


def _models_of_trainer(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    yield trainer.model


def _models_to_prepare(accelerator: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    yield from args


def _model_to_prepare(
    accelerator: Any, model: Any, device_placement: Any = None, evaluation_mode: bool = False
) -> Iterator[Any]:
    # Reference models, reward models and teachers are prepared so; they stay stock.
    if not evaluation_mode:
        yield model


# module -> class, method, who enters training by it
SEAMS: dict[str, tuple[tuple[str, str, Callable[..., Iterator[Any]]], ...]] = {
    "transformers.trainer": (
        ("Trainer", "train", _models_of_trainer),
        ("Trainer", "evaluation_loop", _models_of_trainer),
    ),
    "accelerate.accelerator": (
        ("Accelerator", "prepare", _models_to_prepare),
        ("Accelerator", "prepare_model", _model_to_prepare),
    ),
}

_wrapped: list[tuple[type, str, Any, Any]] = []


def _wrap(owner: type, name: str, models: Callable[..., Iterator[Any]], enter: Enter) -> None:
    original = vars(owner)[name]

    @functools.wraps(original)
    def seam(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in models(self, *args, **kwargs):
            enter(model)
        return original(self, *args, **kwargs)

    setattr(owner, name, seam)
    _wrapped.append((owner, name, original, seam))


def open_seams(module: ModuleType, enter: Enter) -> None:
    """Wrap the methods of `module` that SEAMS names, so that `enter(model)` runs before them."""
    for class_name, method, models in SEAMS[module.__name__]:
        _wrap(getattr(module, class_name), method, models, enter)


def close_seams() -> None:
    """Put the methods back, unless somebody else has wrapped them since."""
    while _wrapped:
        owner, name, original, seam = _wrapped.pop()
        if vars(owner)[name] is seam:
            setattr(owner, name, original)
