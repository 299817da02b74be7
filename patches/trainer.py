"""Trainer itself, whatever it trains: what a step spends beside the model."""

from sloth_plugins.registry import Patch, TrainerSpec, hookimpl

OPTIMIZER = "bitsandbytes.optim.optimizer"


@hookimpl
def sloth_trainers() -> list[TrainerSpec]:
    """Every trainer that derives from Trainer."""
    one_launch = Patch(
        name="optimizer_step",
        target="transformers.trainer:Trainer",
        replacement="sloth_plugins.patches.trainers.optimizer_step:one_launch",
        replaces=(
            f"{OPTIMIZER}:Optimizer8bit.step",
            f"{OPTIMIZER}:Optimizer8bit.get_config",
            f"{OPTIMIZER}:Optimizer2State.init_state",
            f"{OPTIMIZER}:Optimizer2State.update_step",
        ),
        requires=("bitsandbytes>=0.48",),
        # Paged states move between host and device one tensor at a time; the other optimizers are not Adam.
        where={"optim": ("adamw_8bit", "adamw_bnb_8bit")},
        summary="8-bit AdamW over all small tensors in one launch, without waiting for the device after each",
    )
    bookkeeping = Patch(
        name="bookkeeping",
        target="transformers.trainer:Trainer",
        replacement="sloth_plugins.patches.trainers.bookkeeping:remembered",
        summary="no walks through all modules at every step for what does not change",
    )
    async_step = Patch(
        name="async_step",
        target="transformers.trainer:Trainer",
        replacement="sloth_plugins.patches.trainers.async_step:async_step",
        # The loop that asks whether a loss is finite, and not all that it calls, which is the whole trainer.
        replaces=(
            "transformers.trainer:Trainer._run_epoch alone | transformers.trainer:Trainer._inner_training_loop alone",
        ),
        summary="the device is not waited for after each loss, and not while a batch is copied to it",
    )
    memory_plans = Patch(
        name="memory_plans",
        target="transformers.trainer:Trainer",
        replacement="sloth_plugins.patches.trainers.memory_plans:planned",
        summary="a micro-batch that runs out of memory is run again with a tighter plan; processes plan alike",
    )
    statistics = Patch(
        name="statistics",
        target="transformers.trainer:Trainer",
        # It reads what the runtime knows, so it is part of that.
        replacement="sloth_plugins.statistics.trainer:measured",
        summary="throughput, memory and MFU in Trainer's own logs; a table and a picture at the end",
    )
    patches = (one_launch, bookkeeping, async_step, memory_plans, statistics)
    return [TrainerSpec(name="trainer", family="trainer", patches=patches)]
