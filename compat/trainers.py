"""Cells of trainer patches: the trainer, by its name, on a tiny Llama and random data, patched against stock.

A trainer is run with all weights and with adapters. What it samples it samples from the same random numbers, so every
step of it can be compared.
"""

import dataclasses
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from string import ascii_letters
from typing import Any

from lock import changed_code
from verdicts import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Cell, Training, gradient_distance, lora

STEPS = 3
ROWS = 12
VOCABULARY = 96
Row = dict[str, Any]
Text = Callable[[int], str]
"""Random text of so many tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How to run a trainer: a row of its data, made of random text, its own options, and other parts that it takes.

    With `scores` its model gives a number for a text, not the next token.
    """

    row: Callable[[Text], Row]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ()
    scores: bool = False


def _plain(text: Text) -> Row:
    return {"text": text(12)}


def _pair(text: Text) -> Row:
    return {"prompt": text(4), "chosen": " " + text(6), "rejected": " " + text(7)}


def _triple(text: Text) -> Row:
    return {**_pair(text), "reference": " " + text(5)}


def _judged(text: Text) -> Row:
    return {"prompt": text(4), "completion": " " + text(6), "label": text(1).isupper()}


def _prompt(text: Text) -> Row:
    return {"prompt": text(4)}


def _hinted(text: Text) -> Row:
    return {"prompt": text(4), "privileged_context": text(3)}


def _chat(text: Text) -> Row:
    return {"messages": [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(6)}]}


def _tokens(text: Text) -> Row:
    ids = [ord(letter) - 29 for letter in text(12)]
    return {"input_ids": ids, "labels": ids}


RECIPES = {
    "Trainer": Recipe(_tokens, {"optim": "adamw_8bit", "learning_rate": 1e-3}),
    "SFTTrainer": Recipe(_plain),
    "DPOTrainer": Recipe(_pair),
    "KTOTrainer": Recipe(_judged),
    "GRPOTrainer": Recipe(_prompt, {"beta": 0.05}, ("reward_funcs",)),
    "RLOOTrainer": Recipe(_prompt, {"beta": 0.05}, ("reward_funcs",)),
    "RewardTrainer": Recipe(_pair, scores=True),
    "ORPOTrainer": Recipe(_pair),
    "CPOTrainer": Recipe(_pair),
    "TPOTrainer": Recipe(_triple),
    "GKDTrainer": Recipe(_chat, {"lmbda": 0.0}, ("teacher_model",)),
    "GOLDTrainer": Recipe(_chat, {"lmbda": 0.0, "use_uld_loss": False}, ("teacher_model",)),
    "OnlineDPOTrainer": Recipe(_prompt, {}, ("reward_funcs",)),
    "SDFTTrainer": Recipe(_hinted, {"distillation_mode": "full_logits"}),
}


def reward(completions: list[Any], **given: Any) -> list[float]:
    """A reward that depends on every character of a completion."""
    return [sum(map(ord, str(completion))) % 97 / 97 for completion in completions]


def tokenizer() -> Any:
    """A token for each character, bytes below, with a chat template whose prompts are prefixes of what follows them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # \u0120 is how byte-level tokenizers write a space.
    tokens = ["<pad>", "<s>", "</s>", "\u0120", *map(chr, range(33, 33 + VOCABULARY - 4))]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **names)
    made.chat_template = (
        "{% for message in messages %}{{ '<' if message['role'] == 'user' else '>' }}{{ message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    return made


def network(seed: int) -> Any:
    """A tiny Llama whose vocabulary is the tokenizer's."""
    from sloth_plugins.discovery import Plugins
    from sloth_plugins.testing import tiny_model

    llama = Plugins(load_entry_points=False).architectures["llama"]
    return tiny_model(llama, "llama", seed=seed, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def scorer(seed: int) -> Any:
    """A tiny Llama of that vocabulary that gives one number for a text."""
    from transformers import LlamaForSequenceClassification, set_seed

    config = network(seed).config
    config.num_labels = 1
    set_seed(seed)
    return LlamaForSequenceClassification(config)


def rows(make: Callable[[Text], Row]) -> Any:
    """The data of a recipe."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> str:
        letters = torch.randint(len(ascii_letters), (length,), generator=generator)
        return "".join(ascii_letters[index] for index in letters)

    return Dataset.from_list([make(text) for _ in range(ROWS)])


def options(recipe: Recipe, folder: str) -> dict[str, Any]:
    """Arguments of every trainer's config, and those of one; a version that does not know one goes without."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.02,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 24,
        "max_prompt_length": 8,
        "max_completion_length": 6,
        "max_new_tokens": 6,
        "num_generations": 4,
        "warmup_steps": 0,
        **recipe.options,
    }


def build(kind: type, folder: str, *, adapters: bool, legacy: bool = False) -> Any:
    """The trainer, ready to train; `legacy` passes to its constructor what older versions took there."""
    from transformers import set_seed

    recipe = RECIPES[kind.__name__]
    if kind.__name__ == "Trainer":
        config = import_module("transformers").TrainingArguments
    else:
        module = import_module(kind.__module__.removesuffix("_trainer") + "_config")
        config = getattr(module, kind.__name__.replace("Trainer", "Config"))
    known = {field.name for field in dataclasses.fields(config)}
    set_seed(1)
    model = scorer(0) if recipe.scores else network(0)
    # Trainers that need the model twice load it by its name.
    model.save_pretrained(folder)
    model.config._name_or_path = folder
    parts: dict[str, Any] = {"teacher_model": network(7), "reward_funcs": reward}
    taken = inspect.signature(kind).parameters
    given = {name: value for name, value in options(recipe, folder).items() if name in known}
    own: dict[str, Any] = {"tokenizer" if legacy else "processing_class": tokenizer()}
    if legacy:
        own["max_length"] = given.pop("max_length")
    return kind(
        model=lora(model) if adapters else model,
        args=config(**given),
        train_dataset=rows(recipe.row),
        **own,
        **{name: parts[name] for name in recipe.parts if name in taken},
    )


def globals_of_trl() -> dict[tuple[str, str], Any]:
    """Every function and class that TRL's modules hold; held here, lest another comes to lie where one was."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "trl"
        for key, value in list(vars(module).items())
        if callable(value)
    }


def train(trainer: Any, selection: str) -> Training:
    """Three steps; `selection` comes in through the seam, as with SLOTH_PLUGINS."""
    from transformers import TrainerCallback, set_seed

    import sloth_plugins
    from sloth_plugins.activation import deactivate
    from sloth_plugins.application import patched

    losses: list[float] = []
    gradients: list[dict[str, Any]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # untyped upstream
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            named = trainer.model.named_parameters()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    backward = trainer.accelerator.backward

    def watched(loss: Any, **given: Any) -> Any:
        losses.append(float(loss.detach()))
        return backward(loss, **given)

    trainer.accelerator.backward = watched
    trainer.add_callback(Watch())
    set_seed(1)
    if selection:
        sloth_plugins.activate(selection)
    try:
        trainer.train()
    finally:
        deactivate()
    return Training(losses, gradients, [], int(patched(trainer) is not None))


def compare(cell: Cell, found: Training, stock: Training, what: str) -> None:
    """Same losses and gradients, step by step."""
    if not found.patched:
        cell.fail("application", f"the trainer was not patched {what}")
        return
    # Some of these losses are differences of what is nearly equal.
    pairs = itertools.zip_longest(found.losses, stock.losses, fillvalue=float("inf"))
    worst = max((abs(a - b) / max(1.0, abs(b)) for a, b in pairs), default=float("inf"))
    if len(found.losses) != STEPS or not worst <= LOSS_TOLERANCE:
        cell.fail("losses", f"{worst:.1e} from stock {what}")
    distances = [gradient_distance(a, b) for a, b in zip(found.gradients, stock.gradients, strict=False)]
    if len(distances) != STEPS or not all(distance <= GRADIENT_TOLERANCE for distance in distances):
        cell.fail("gradients", f"{max(distances, default=float('inf')):.1e} from stock {what}")


def find_class(cell: Cell, patch: Any) -> type | None:
    """The trainer's class, or None: it is not meant for this TRL, or cannot be imported."""
    for path in (patch.target, *patch.formerly):
        module, _, name = path.partition(":")
        try:
            if find_spec(module) is not None and hasattr(import_module(module), name):
                found: type = getattr(import_module(module), name)
                return found
        except ModuleNotFoundError as error:
            # A parent that is missing is TRL's own; anything else is missing here.
            if not module.startswith(str(error.name)):
                cell.fail("target", f"{path} cannot be imported: {error}")
                return None
    cell.state, cell.reason = "unsupported", f"{patch.target.partition(':')[2]} does not exist"
    return None


def resolve(cell: Cell, spec: Any, patch: Any) -> type | None:
    """Requirements, target, signature and fingerprint; None if there is nothing to train."""
    from sloth_plugins.environment import probe
    from sloth_plugins.planning import unmet_condition
    from sloth_plugins.registry import Skip
    from sloth_plugins.resolving import bind_constructor, bind_trainer

    if cell.is_unsupported(unmet_condition(patch, spec, None, probe())):
        return None
    kind = find_class(cell, patch)
    if kind is None:
        return None
    bound: Any = bind_constructor(patch, kind) if patch.constructor else bind_trainer(patch, kind)
    if isinstance(bound, Skip):
        cell.fail("signature" if "signature" in bound.reason else "target", bound.reason)
        return None
    diff = changed_code(patch, of_trainer=True)
    if diff is not None:
        cell.fail("fingerprint", bound.drift or "not in compat/upstream.lock")
        cell.diff = diff
    return kind


def run(cell: Cell, spec: Any, name: str) -> None:
    """All checks of the cell of one trainer patch."""
    from sloth_plugins.registry import Experimental

    patch = next(patch for patch in spec.patches if patch.name == name)
    kind = resolve(cell, spec, patch)
    if kind is None:
        return
    trained = kind.__name__ in RECIPES
    if not cell.failed and (not trained or isinstance(patch.status, Experimental)):
        cell.state = "experimental"
        cell.reason = patch.status.note if trained else f"{kind.__name__} is not trained in the matrix"
    if not trained:
        return
    check = check_constructor if patch.constructor else check_training
    for adapters in (False, True):
        check(cell, kind, f"{spec.name}:{name}", adapters=adapters)


def check_constructor(cell: Cell, kind: type, selection: str, *, adapters: bool) -> None:
    """A trainer called as older versions had it trains as one that is called as this version has it."""
    import sloth_plugins
    from sloth_plugins.construction import outcomes_of

    what = "with adapters" if adapters else "with all weights"
    own = vars(kind)["__init__"]
    with tempfile.TemporaryDirectory() as folder:
        stock = train(build(kind, folder, adapters=adapters), "")
        sloth_plugins.activate(selection)
        try:
            trainer = build(kind, folder, adapters=adapters, legacy=True)
        finally:
            sloth_plugins.deactivate()
        if vars(kind)["__init__"] is not own:
            cell.fail("revert", f"{kind.__name__} has another constructor {what}")
        found = train(trainer, "")
        found.patched = len(outcomes_of(trainer))
        compare(cell, found, stock, what)


def check_training(cell: Cell, kind: type, selection: str, *, adapters: bool) -> None:
    """A stock run, a patched one, and what is left after revert."""
    import sloth_plugins
    from sloth_plugins.application import patched_modules

    what = "with adapters" if adapters else "with all weights"
    with tempfile.TemporaryDirectory() as folder:
        stock = train(build(kind, folder, adapters=adapters), "")
        trainer = build(kind, folder, adapters=adapters)
        before = globals_of_trl()
        compare(cell, train(trainer, selection), stock, what)
        sloth_plugins.revert(trainer.model)
        if any(patched_modules(trainer.model)) or type(trainer) is not kind:
            cell.fail("revert", f"the trainer is not what it was {what}")
        after = globals_of_trl()
        changed = [".".join(key) for key in before if after.get(key, before[key]) is not before[key]]
        if changed:
            cell.fail("revert", f"{', '.join(changed[:3])} of TRL changed {what}")
