"""Unmodified training scripts, with the flag and without: the same losses, and a table from the main process."""

import os
import re
import signal
import subprocess
import time

import pytest
from launching import ACCELERATE, WARM, environment, launch, python, run, warm
from paths import SCRIPTS

pytestmark = pytest.mark.slow
TABLE = (
    r"llama:rms_norm +5 +applied",
    r"llama:rope +2 +applied",
    r"llama:glu +2 +applied",
    r"llama:blocks +2 +applied",
)


def assert_same(stock, patched):
    assert len(stock) == len(patched) == 6
    assert patched == pytest.approx(stock, rel=1e-5)
    assert len(set(stock)) == 6


def assert_table_once(log):
    for line in TABLE:
        assert len(re.findall(line, log)) == 1, log


@pytest.mark.parametrize(
    ("script", "through"),
    [("train_trainer.py", ACCELERATE), ("train_sft.py", WARM), ("train_loop.py", WARM)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_script_trains_to_the_same_losses(script, through, tmp_path):
    stock, quiet = launch(script, tmp_path, through=WARM)
    patched, log = launch(script, tmp_path, flag="1", through=through)
    assert_same(stock, patched)
    assert_table_once(log)
    assert "sloth-plugins" not in quiet


def test_gradient_checkpointing_in_trainer(tmp_path):
    stock, _ = launch("train_trainer.py", tmp_path, arguments=["--checkpointing"], through=WARM)
    patched, log = launch("train_trainer.py", tmp_path, flag="1", arguments=["--checkpointing"], through=WARM)
    assert_same(stock, patched)
    assert_table_once(log)


def test_by_hand_without_trainer_or_accelerate(tmp_path):
    stock, _ = launch("train_bare.py", tmp_path, flag="off", through=WARM)
    patched, log = launch("train_bare.py", tmp_path, through=WARM)
    assert_same(stock, patched)
    assert "patched 13" in log
    _, log = launch("train_bare.py", tmp_path, flag="1", through=WARM)
    assert "nothing was patched" not in log


def test_two_processes_patch_both_and_speak_once(tmp_path):
    stock, _ = launch("train_trainer.py", tmp_path, processes=2, through=WARM)
    patched, log = launch("train_trainer.py", tmp_path, processes=2, flag="1")
    assert_same(stock, patched)
    assert_table_once(log)
    assert "2 processes" in log


@pytest.mark.parametrize("processes", [1, 2])
def test_metrics_of_logits_gathered_from_all_processes(processes, tmp_path):
    stock, _ = launch("train_metrics.py", tmp_path, processes=processes, through=WARM)
    patched, log = launch("train_metrics.py", tmp_path, processes=processes, flag="1", through=WARM)
    assert len(stock) == 6 + 2 * 3
    assert patched == pytest.approx(stock, rel=1e-4)
    assert re.search(r"llama:cross_entropy +1 +applied", log)


def test_accelerates_own_cpu_flag_with_two_processes(tmp_path):
    command = [*ACCELERATE, "--num_processes", "2", "--cpu", SCRIPTS / "train_loop.py"]
    done = run(command, tmp_path, flag="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_table_once(done.stderr)


def test_every_process_is_patched(tmp_path):
    script = tmp_path / "probe.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\nfrom common import end, model\n"
        "from sloth_plugins.application import patched\n"
        "accelerator = Accelerator(cpu=True)\nnetwork = accelerator.prepare(model())\n"
        "count = torch.tensor([sum(patched(m) is not None for m in network.modules())])\n"
        # One write a process: print() writes its pieces one by one where Python is unbuffered.
        "print(f'COUNTS {accelerator.gather(count).tolist()}\\n', end='')\nend(accelerator)\n"
    )
    done = warm([script], tmp_path, flag="1", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("COUNTS [13, 13]") == 2
    assert done.stderr.count("sloth-plugins 0") == 1


def test_through_the_module_where_autoload_is_off(tmp_path):
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    quiet = python("import torch, sys; print('sloth_plugins' in sys.modules)", tmp_path, flag="1", **off)
    assert quiet.stdout.split() == ["False"]
    stock, _ = launch("train_trainer.py", tmp_path, through=WARM)
    through = [*ACCELERATE, "--cpu", "--num_processes", "1", "-m", "sloth_plugins"]
    patched, log = launch("train_trainer.py", tmp_path, through=through, **off)
    assert_same(stock, patched)
    assert_table_once(log)


def test_a_choice_is_kept(tmp_path):
    _, log = launch("train_loop.py", tmp_path, flag="llama:rms_norm+rope", through=WARM)
    assert re.search(TABLE[0], log)
    assert re.search(TABLE[1], log)
    assert re.search("llama:glu +0 +off +not selected", log)


def test_an_unknown_architecture_trains_stock_and_says_so_once(tmp_path):
    arguments = ["--model-type", "opt"]
    stock, _ = launch("train_loop.py", tmp_path, arguments=arguments, through=WARM)
    patched, log = launch("train_loop.py", tmp_path, flag="1", arguments=arguments, through=WARM)
    assert patched == stock
    assert log.count("no architecture covers model type 'opt' (known: llama") == 1


def test_a_typo_ends_the_launcher_before_anything_is_loaded(tmp_path):
    start = time.monotonic()
    done = run([*ACCELERATE, "--cpu", "--num_processes", "1", SCRIPTS / "train_trainer.py"], tmp_path, flag="lama")
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'llama'") == 1
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 60


def test_an_interrupt_in_mid_training_ends_it(tmp_path):
    command = [*ACCELERATE, "--cpu", "--num_processes", "1", SCRIPTS / "train_loop.py", "--steps", "100000"]
    script = tmp_path / "long.py"
    script.write_text((SCRIPTS / "train_loop.py").read_text().replace("rows()", "rows(400000)"))
    command[-3] = str(script)
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment("1"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and so may be the one that runs the tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "llama:glu" in line:
            break
    time.sleep(2)
    assert process.poll() is None, "".join(seen)
    os.killpg(process.pid, signal.SIGINT)
    try:
        rest = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in rest
    assert "nothing was patched" not in rest
