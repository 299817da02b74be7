"""TRL's trainers: where they hold logits of a whole batch, hidden states take their place.

SFT, DPO, KTO, GRPO, RLOO and asynchronous GRPO already project in chunks through one function of TRL's own; there only
that function changes. The others stay as they are, on logits that are deferred.
"""

from collections.abc import Iterator

from sloth_plugins.registry import Patch, TrainerSpec, hookimpl

TRAINERS = "sloth_plugins.patches.trainers"
FUSED_HEAD = {
    "sft": "trl.trainer.sft_trainer:SFTTrainer",
    "dpo": "trl.trainer.dpo_trainer:DPOTrainer",
    "kto": "trl.trainer.kto_trainer:KTOTrainer",
    "grpo": "trl.trainer.grpo_trainer:GRPOTrainer",
    "rloo": "trl.trainer.rloo_trainer:RLOOTrainer",
    "async_grpo": "trl.experimental.async_grpo.async_grpo_trainer:AsyncGRPOTrainer",
}
# In 1.15, which no pin pairs since it has no CPU path, and in 1.16.
FUSED_HEAD_CODE = ("c92759fb12e86212", "ed06b64a6afca47a")
# Log-probabilities of completions, whose code is the same in GRPO and RLOO, in 1.15 and in 1.16.
UNPADDED_CODE = ("d72190d114a97935",)
# Where completions come from `generate` of the unwrapped model: the method, what it gets, its code in 1.15 and in 1.16.
ROLLOUTS = {
    "grpo": ("_generate_single_turn", "decoded", ("4b546abea0b529d1", "d9adee74a703af47")),
    "rloo": ("_generate_single_turn", "decoded", ("c40524c56a203a4f", "4614056f77874978")),
    "online_dpo": ("_generate", "decoded_online", ("ad226e901d511f7d", "fdf093d82b873cc2")),
}


# Trainers that took in their constructors what their configs take now.
LEGACY = {
    "sft": ("trl.trainer.sft_trainer:SFTTrainer",),
    "dpo": ("trl.trainer.dpo_trainer:DPOTrainer",),
    "kto": ("trl.trainer.kto_trainer:KTOTrainer", "trl.experimental.kto.kto_trainer:KTOTrainer"),
    "reward": ("trl.trainer.reward_trainer:RewardTrainer",),
    "orpo": ("trl.experimental.orpo.orpo_trainer:ORPOTrainer",),
    "cpo": ("trl.experimental.cpo.cpo_trainer:CPOTrainer",),
}


def _trainer(name: str, *patches: Patch) -> TrainerSpec:
    found = (*patches, *_rollouts(name, patches[0].target if patches else ""), *_legacy(name))
    return TrainerSpec(name=f"trl_{name}", family="trl", patches=found)


def _rollouts(name: str, target: str) -> Iterator[Patch]:
    if name in ROLLOUTS:
        method, factory, code = ROLLOUTS[name]
        yield Patch(
            name="rollout_decoding",
            target=target,
            replacement=f"{TRAINERS}.rollouts:{factory}",
            replaces=(f"{target}.{method} alone",),
            requires=("trl>=1.15",),
            fingerprints=code,
            summary="completions sampled over a static cache, on a GPU a CUDA graph for each token",
        )
    if name in ("grpo", "rloo"):
        yield Patch(
            name="rollout_unpadded",
            target=target,
            replacement=f"{TRAINERS}.unpadded:unpadded",
            replaces=(f"{target}._get_per_token_logps_and_entropies alone",),
            requires=("trl>=1.15",),
            fingerprints=UNPADDED_CODE,
            summary="log-probabilities of completions without padding, a micro-batch as one row of documents",
        )


def _legacy(name: str) -> Iterator[Patch]:
    """Whether a call fits is asked of the installed class, so that no fingerprint of its constructor is needed."""
    if name in LEGACY:
        yield Patch(
            name="trl_legacy_arguments",
            target=LEGACY[name][0],
            formerly=LEGACY[name][1:],
            replacement=f"{TRAINERS}.legacy_arguments:translated",
            requires=("trl>=0.27",),
            constructor=True,
            summary="tokenizer=, max_seq_length= and others that TRL has moved, taken where they were",
        )


def _experimental(name: str, trainer: str, replacement: str, *methods: str, since: str = "0.27") -> TrainerSpec:
    target = f"trl.experimental.{name}.{name}_trainer:{trainer}"
    return _trainer(
        name,
        Patch(
            name=f"trl_{name}",
            target=target,
            replacement=f"{TRAINERS}.{replacement}",
            replaces=tuple(f"{target}.{method}" for method in methods),
            requires=(f"trl>={since}",),
            summary="the loss in chunks, without the logits of the batch",
        ),
    )


@hookimpl
def sloth_trainers() -> Iterator[TrainerSpec]:
    """Those that train a language model."""
    for name, target in FUSED_HEAD.items():
        yield _trainer(
            name,
            Patch(
                name="trl_logprobs",
                target=target,
                replacement=f"{TRAINERS}.log_probs:chunked",
                replaces=("trl.kernels.chunked_logprob:ChunkedLogProbFunction",),
                # Before, the function that this stands in for took other arguments.
                requires=("trl>=1.15",),
                fingerprints=FUSED_HEAD_CODE,
                summary="log-probabilities in two products where the head is frozen; TRL needs three",
            ),
        )
    yield _trainer("reward")
    yield _experimental("orpo", "ORPOTrainer", "preference:odds_ratio", "get_batch_loss_metrics", "get_batch_logps")
    yield _experimental("cpo", "CPOTrainer", "preference:odds_ratio", "get_batch_loss_metrics", "get_batch_logps")
    yield _experimental("tpo", "TPOTrainer", "preference:triple", "_compute_loss", since="1.4")
    yield _experimental("online_dpo", "OnlineDPOTrainer", "preference:online", "_forward")
    yield _experimental("gkd", "GKDTrainer", "distillation:generalized_jsd", "compute_loss", "generalized_jsd_loss")
    yield _experimental("gold", "GOLDTrainer", "distillation:generalized_jsd", "compute_loss", "generalized_jsd_loss")
    yield _experimental("sdft", "SDFTTrainer", "distillation:self_distillation", "compute_loss", since="1.6")
