"""What is lost where a step fails: nothing. What is said: one line."""

import logging
import os
import signal
import types

import pytest
import torch
import trainers
from trl import GRPOTrainer

import sloth_plugins
from sloth_plugins.patches.rollouts.rescue import RolloutError, told

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trainer(tmp_path, _one_thread):
    """GRPO on a tiny Llama, as a trainer with rollouts has it."""
    made = trainers.build(GRPOTrainer, str(tmp_path), adapters=True)
    made.args.use_vllm = True
    return made


def fails(trainer, how, step=2):
    """Have a step after `step` whole ones end in `how()`; returns the state that those have made."""
    state = {}

    def reward(completions, **given):
        if trainer.state.global_step == step:
            state.update({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
            how()
        return trainers.reward(completions)

    trainer.reward_funcs = [reward]
    sloth_plugins.patch(trainer.model, "trl:rollout_rescue", trainer=trainer)
    return state


def boom():
    raise ValueError("a reward that cannot be computed\nand why")


def test_a_step_that_fails_leaves_a_checkpoint_of_the_state_before_it(trainer, tmp_path, caplog):
    state = fails(trainer, boom)
    with pytest.raises(ValueError, match="a reward"), caplog.at_level(logging.ERROR):
        trainer.train()
    place = tmp_path / "checkpoint-2"
    lines = [record.getMessage() for record in caplog.records if record.name == "sloth_plugins"]
    assert lines == [
        f"sloth-plugins: a reward that cannot be computed: the state after step 2 is in {place}, from which "
        "resume_from_checkpoint goes on"
    ]
    from safetensors.torch import load_file

    saved = load_file(place / "adapter_model.safetensors")
    assert saved
    assert all(torch.equal(value, state[name.replace(".weight", ".default.weight")]) for name, value in saved.items())


def test_training_goes_on_from_there(trainer, tmp_path):
    fails(trainer, boom)
    with pytest.raises(ValueError, match="a reward"):
        trainer.train()
    again = trainers.build(GRPOTrainer, str(tmp_path), adapters=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == trainers.STEPS
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3]


def test_a_launcher_that_ends_this_process_is_heard(trainer, tmp_path):
    fails(trainer, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_is_saved_before_the_first_step_or_after_a_failure_to_save(trainer, tmp_path, caplog):
    fails(trainer, boom, step=0)
    with pytest.raises(ValueError, match="a reward"):
        trainer.train()
    assert "nothing was trained yet" in caplog.text
    fails(trainer, boom, step=1)
    trainer._save_checkpoint = lambda *args: (_ for _ in ()).throw(OSError("no room"))
    with pytest.raises(ValueError, match="a reward"):
        trainer.train()
    assert "the state after step 1 cannot be saved (OSError: no room)" in caplog.text


class Rollouts:
    """As much of TRL's class as fails."""

    gpu_memory_utilization, max_model_length = 0.9, 4096

    def __init__(self, error, client=None):
        self.error = error
        if client is not None:
            self.vllm_client = types.SimpleNamespace(base_url=client)

    def _init_vllm(self):
        raise self.error

    def sync_weights(self):
        raise self.error

    def generate(self):
        raise self.error


@pytest.mark.parametrize(
    ("method", "error", "expected"),
    [
        ("_init_vllm", ImportError("vLLM is not available\nand more"), "cannot be imported: vLLM is not available"),
        (
            "_init_vllm",
            ValueError("Free memory on device (3 GiB) is less than desired"),
            "does not fit beside the trainer's model: Free memory on device (3 GiB) is less than desired; it was given "
            "vllm_gpu_memory_utilization=0.9 and vllm_max_model_length=4096",
        ),
        ("_init_vllm", torch.OutOfMemoryError("Tried to allocate"), "does not fit beside"),
        ("sync_weights", ConnectionError("refused"), "server at http://here cannot be reached any more"),
        ("generate", ConnectionResetError("gone"), "server at http://here cannot be reached any more"),
    ],
)
def test_failures_are_told_in_one_line(method, error, expected):
    kind = type("Told", (Rollouts,), told(Rollouts))
    with pytest.raises(RolloutError) as raised:
        getattr(kind(error, None if method == "_init_vllm" else "http://here"), method)()
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_what_nobody_knows_stays_what_it_is():
    kind = type("Told", (Rollouts,), told(Rollouts))
    for error in (KeyError("x"), OSError("a file of ours")):
        with pytest.raises(type(error)):
            kind(error).generate()


def test_a_process_that_dies_costs_no_step(engine):
    found, log = engine("lonely")
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(found["saved"])
    assert "the state after step 1 is in" in log
