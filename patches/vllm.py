"""TRL's rollouts through vLLM: what it is started with, and how it gets the weights that are trained."""

from sloth_plugins.registry import Experimental, Patch, TrainerSpec, hookimpl

ROLLOUTS = "sloth_plugins.patches.rollouts"
GENERATION = "trl.generation.vllm_generation:VLLMGeneration"
TRIED = Experimental("tested with vLLM on a CPU, never on a GPU")


@hookimpl
def sloth_trainers() -> list[TrainerSpec]:
    """What starts vLLM and talks to it for every trainer with rollouts."""
    dtype = Patch(
        name="vllm_dtype",
        target=GENERATION,
        replacement=f"{ROLLOUTS}.dtype:alike",
        replaces=(f"{GENERATION}._init_vllm alone",),
        requires=("trl>=1.13",),
        status=TRIED,
        summary="colocated vLLM computes in the trainer's dtype, not in one of its own choice",
    )
    swap = Patch(
        name="vllm_lora_swap",
        target=GENERATION,
        replacement=f"{ROLLOUTS}.swap:swapped",
        replaces=(f"{GENERATION}._init_vllm alone", f"{GENERATION}.sync_weights", f"{GENERATION}.generate alone"),
        requires=("trl>=1.13",),
        status=TRIED,
        summary="the adapter goes to vLLM as an adapter; TRL merges it into the base and loads all weights",
    )
    shared = Patch(
        name="vllm_shared_weights",
        target=GENERATION,
        replacement=f"{ROLLOUTS}.sharing:shared",
        replaces=(f"{GENERATION}._init_vllm alone",),
        requires=("trl>=1.13",),
        status=TRIED,
        # One tensor with two owners is for who knows that nobody merges into it.
        default=False,
        summary="trainer and colocated vLLM have one base, not two",
    )
    told = Patch(
        name="rollout_rescue",
        target=GENERATION,
        replacement=f"{ROLLOUTS}.rescue:told",
        requires=("trl>=1.13",),
        summary="what fails between trainer and vLLM is told in one line",
    )
    rescued = Patch(
        name="rollout_rescue",
        target="trl.trainer.base_trainer:_BaseTrainer",
        replacement=f"{ROLLOUTS}.rescue:rescued",
        requires=("trl>=1.13",),
        where={"use_vllm": (True,)},
        summary="a step that fails leaves a checkpoint of the state before it",
    )
    return [
        TrainerSpec(name="trl_vllm", family="trl", patches=(dtype, swap, shared, told)),
        TrainerSpec(name="trl_base", family="trl", patches=(rescued,)),
    ]
