"""`sloth-plugins stats`: a run's folder in, a table and a picture out; a mistake is one line."""

import json

import pytest
from typer.testing import CliRunner

from sloth_plugins import cli
from sloth_plugins.statistics import picture
from sloth_plugins.statistics.history import History
from sloth_plugins.statistics.picture import FILE


def state(steps, **more):
    entries = [
        {
            "step": i,
            "loss": 3 - i / 10,
            "learning_rate": 1e-4,
            "step_seconds": 0.5,
            "tokens_per_second": 2000.0,
            "peak_memory_gib": 7.25,
            "mfu": 0.4,
        }
        for i in range(1, steps + 1)
    ]
    return {"global_step": steps, "max_steps": 20, "log_history": entries, **more}


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(content if isinstance(content, str) else json.dumps(content))


def run(folder):
    done = CliRunner().invoke(cli.app, ["stats", str(folder)])
    return done.exit_code, done.output


def test_the_newest_checkpoint_is_read(tmp_path):
    write(tmp_path / "checkpoint-2", state(2))
    write(tmp_path / "checkpoint-10", state(10))
    (tmp_path / "checkpoint-12").mkdir()
    code, told = run(tmp_path)
    assert code == 0
    rows = dict(line.strip().split("  ", 1) for line in told.splitlines() if line.startswith("  "))
    assert told.startswith("10 steps")
    assert rows["training loss"].strip() == "2.9000 at first, 2.0000 at last, lowest 2.0000 at step 10"
    assert rows["tokens a second"].strip() == "2,000 on each device"
    assert [line.split()[1] for line in told.splitlines() if "MFU" in line] == ["40.0%"]
    assert (tmp_path / FILE).read_bytes().startswith(b"\x89PNG")


def test_the_folders_own_state_is_read_where_it_is_further_on(tmp_path):
    write(tmp_path / "checkpoint-5", state(5))
    write(tmp_path, state(8))
    assert run(tmp_path)[1].startswith("8 steps")
    assert run(tmp_path / "checkpoint-5")[1].startswith("5 steps")


def test_a_stock_runs_log_is_shown_as_far_as_it_goes(tmp_path):
    entries = [{"step": i, "loss": 1.0, "learning_rate": 1e-4} for i in (1, 2)]
    write(tmp_path, {"global_step": 2, "log_history": [*entries, {"step": 2, "train_runtime": 75.0}]})
    code, told = run(tmp_path)
    assert code == 0
    assert told.startswith("2 steps in 1 min 15 s\n")
    assert "tokens" not in told
    assert (tmp_path / FILE).is_file()


def test_several_eval_data_sets_have_a_row_each(tmp_path):
    found = state(4)
    for i in (2, 4):
        found["log_history"] += [{"step": i, "eval_near_loss": 1.0 / i}, {"step": i, "eval_far_loss": 2.0 / i}]
    write(tmp_path, found)
    rows = dict(line.strip().split("  ", 1) for line in run(tmp_path)[1].splitlines() if line.startswith("  "))
    assert rows["eval near loss"].strip() == "0.5000 at first, 0.2500 at last, lowest 0.2500 at step 4"
    assert rows["eval far loss"].strip() == "1.0000 at first, 0.5000 at last, lowest 0.5000 at step 4"
    losses = picture._figure(History(found["log_history"])).axes[0]
    assert [line.get_label() for line in losses.get_lines()] == ["training", "eval near", "eval far"]


def test_the_time_of_a_resumed_run_is_that_of_all_its_steps(tmp_path):
    found = state(10)
    found["log_history"].append({"step": 10, "train_runtime": 1.2})
    write(tmp_path, found)
    assert run(tmp_path)[1].startswith("10 steps in 5.0 s of training, resumed\n")


def test_a_run_of_reinforcement_learning_shows_its_reward_and_where_its_time_went(tmp_path):
    found = state(20)
    for i, entry in enumerate(found["log_history"]):
        entry |= {"reward": i / 20, "loss_seconds": 0.125, "rollout_tokens_per_second": 3000.0}
        if i % 2:  # every second step trains on what the one before has sampled
            entry["rollout_seconds"] = 0.25
    write(tmp_path, found)
    rows = dict(line.strip().split("  ", 1) for line in run(tmp_path)[1].splitlines() if line.startswith("  "))
    assert rows["reward"].strip() == "0.025 in the first tenth, 0.925 in the last"
    assert rows["where it went"].strip() == "rollout 25%, loss 25%, the rest 50%"
    assert rows["tokens a second"].strip() == "2,000 on each device, 3,000 sampled in rollouts"
    titles = [axis.get_title(loc="left") for axis in picture._figure(History(found["log_history"])).axes]
    assert titles[0] == "Reward"
    assert titles[-1] == "Where the time goes"


def test_the_pictures_mfu_is_the_tables(tmp_path):
    found = state(3)
    for entry, mfu in zip(found["log_history"], (0.01, 0.401, 0.403), strict=True):
        entry["mfu"] = mfu
    write(tmp_path, found)
    assert [line.split()[1] for line in run(tmp_path)[1].splitlines() if "MFU" in line] == ["40.2%"]
    titles = [axis.get_title(loc="left") for axis in picture._figure(History(found["log_history"])).axes]
    assert "Throughput (MFU 40.2%)" in titles


def test_our_own_picture_is_drawn_again(tmp_path):
    write(tmp_path, state(5))
    run(tmp_path)
    first = (tmp_path / FILE).read_bytes()
    write(tmp_path, state(9))
    run(tmp_path)
    assert (tmp_path / FILE).read_bytes() != first


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "holds no trainer_state.json, nor a checkpoint-N folder with one"),
        ("{", "cannot be read"),
        ('{"step": 1}', "has no log_history"),
        ('{"log_history": [1]}', "has no log_history"),
        ('{"log_history": []}', "has logged no loss yet"),
        ('{"log_history": [], "global_step": "x"}', "has global_step 'x'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, content, line):
    if content is not None:
        write(tmp_path, content)
    code, told = run(tmp_path)
    assert code == 2
    assert line in told
    assert len(told.splitlines()) == 1


def test_a_misspelt_folder_has_a_nearest(tmp_path):
    (tmp_path / "outputs").mkdir()
    code, told = run(tmp_path / "output")
    assert (code, len(told.splitlines())) == (2, 1)
    assert "did you mean 'outputs'?" in told
    write(tmp_path, state(5))
    assert "did you mean" not in run(tmp_path / "trainer_state.json")[1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(tmp_path, state(5))
    monkeypatch.setattr(picture.os, "replace", full)
    code, told = run(tmp_path)
    assert code == 2
    assert told.splitlines()[-1] == "sloth-plugins: the picture cannot be written: [Errno 28] No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]
