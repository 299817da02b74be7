"""Full disks, damaged files, other bases, interruptions: one line each, nothing lost, nothing half-written."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from adapted_models import adapt, load, save_base, without
from folders import SHARD, files, refused

from sloth_plugins.export import merge, writing
from sloth_plugins.export.marking import MARK


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_full_disk_keeps_what_is_whole_and_the_next_run_goes_on(place, tmp_path, fails_at_second):
    calls = fails_at_second(OSError(errno.ENOSPC, "No space left on device"))
    refused("the disk is full; what is complete is kept there", place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert not (tmp_path / "out").exists()
    assert shards(tmp_path / "out.partial") == ["model-00001-of-00002.safetensors"]
    written = (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").stat().st_mtime_ns
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {
        MARK,
        calls[0].with_suffix(".safetensors").name,
    }
    merge(place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert len(calls) == 3, "the first shard was not written again"
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / "out.partial").exists()
    assert files(merge(place / "run", tmp_path / "again", shard_bytes=SHARD)) == files(tmp_path / "out")


def test_a_disk_that_is_really_full_is_told(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        refused(r"small.* needs 0\.0 GB, and 0\.0 GB are free", place / "run", small / "out", dtype="float32")
        (small / "filler").write_bytes(bytes(150_000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "check_space", lambda *_: None)
            refused("the disk is full", place / "run", small / "out")
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_limit_on_the_size_of_files_is_told(place, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        refused("the disk is full", place / "run", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("out*"))


def test_other_inputs_do_not_go_on_from_there(place, tmp_path, fails_at_second):
    calls = fails_at_second(OSError(errno.ENOSPC, "No space left on device"))
    refused("the disk is full", place / "run", tmp_path / "out", shard_bytes=SHARD)
    without(place / "run", lora_alpha=1)
    merge(place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert len(calls) == 4, "both shards were written"
    assert files(merge(place / "run", tmp_path / "again", shard_bytes=SHARD)) == files(tmp_path / "out")


def test_a_shard_that_was_damaged_in_between_is_written_again(place, tmp_path, fails_at_second):
    calls = fails_at_second(OSError(errno.ENOSPC, "No space left on device"))
    refused("the disk is full", place / "run", tmp_path / "out", shard_bytes=SHARD)
    shard = tmp_path / "out.partial" / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    merge(place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert len(calls) == 4


def test_a_live_model_begins_again(place, tmp_path, fails_at_second):
    model = adapt(load(place / "base"))
    calls = fails_at_second(OSError(errno.ENOSPC, "No space left on device"))
    refused("the disk is full$", model, tmp_path / "out", shard_bytes=SHARD)
    assert not list(tmp_path.glob("out*"))
    merge(model, tmp_path / "out", shard_bytes=SHARD)
    assert len(calls) == 4


def test_a_folder_that_may_not_be_written_is_told(place, tmp_path):
    merge(place / "run", tmp_path / "first")  # imports what root alone may read
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    user = os.geteuid()
    # pytest's own folders among them, which it makes for their owner alone.
    above = [path for path in tmp_path.parents if Path(tempfile.gettempdir()) in path.parents]
    for path in (*above, tmp_path, place, *place.rglob("*")) if user == 0 else ():
        path.chmod(path.stat().st_mode | 0o555)
    try:
        os.seteuid(user or 65534)  # root may write anywhere
        refused(r"cannot write .*closed/out\.partial: Permission denied$", place / "run", closed / "out")
        os.seteuid(user)
        (place / "base" / "model-00002-of-00002.safetensors").chmod(0)
        os.seteuid(user or 65534)
        refused(r"cannot read .*model-00002.*: Permission denied$", place / "run", tmp_path / "out")
        os.seteuid(user)
        (place / "run").chmod(0)
        os.seteuid(user or 65534)
        refused("cannot read .*run.*: Permission denied$", place / "run", tmp_path / "out")
    finally:
        os.seteuid(user)
        (place / "run").chmod(0o755)
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize("name", ["base/model-00001-of-00002.safetensors", "run/adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_damaged_file_is_named(place, tmp_path, name, damage):
    file = place / name
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    refused(f"{file.name} is damaged or was not downloaded whole", place / "run", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_missing_shard_is_named(place, tmp_path):
    (place / "base" / "model-00002-of-00002.safetensors").unlink()
    refused(r"lacks model-00002-of-00002\.safetensors of its index", place / "run", tmp_path / "out")


def test_a_damaged_index_or_config_is_named(place, tmp_path):
    index = place / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(r"lacks model\.extra\.weight, which", place / "run", tmp_path / "out")
    index.write_text("{")
    refused(r"index\.json cannot be read", place / "run", tmp_path / "out")
    for file in (place / "run" / "adapter_config.json", place / "base" / "config.json"):
        saved = file.read_text()
        file.write_text(saved[:50])
        refused(f"{file.name}.* cannot be read", place / "run", tmp_path / "out")
        file.write_text(saved)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"hidden_size": 128}, r"has model\.layers.* for shape .*, .*other has .*trained on another base"),
        ({"num_hidden_layers": 1}, r"changes model\.layers\.1.*, which .*other does not have"),
    ],
)
def test_an_adapter_of_another_base_is_refused(place, tmp_path, other, said):
    save_base(tmp_path / "other", **other)
    refused(said, place / "run", tmp_path / "out", base=tmp_path / "other")


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], r".*\.(q|down)_proj"])
def test_an_adapter_of_a_base_with_fewer_layers_is_refused(place, tmp_path, modules):
    adapt(load(place / "base"), target_modules=modules).save_pretrained(place / "two")
    save_base(tmp_path / "three", num_hidden_layers=3)
    said = r"nothing for model\.layers\.2\..*three, which its target_modules name: .*with fewer layers"
    refused(said, place / "two", tmp_path / "out", base=tmp_path / "three")
    if isinstance(modules, list):  # PEFT chooses layers by lists alone
        some = adapt(load(tmp_path / "three"), target_modules=modules, layers_to_transform=[0, 1])
        some.save_pretrained(place / "some")
        merge(place / "some", tmp_path / "out")


def test_trained_tokens_of_a_larger_vocabulary_are_refused(place, tmp_path):
    adapt(load(place / "base"), trainable_token_indices=[3, 120]).save_pretrained(place / "tokens")
    save_base(tmp_path / "other", vocab_size=100)
    refused("trains token 120, and .* has 100 rows", place / "tokens", tmp_path / "out", base=tmp_path / "other")


def test_an_embedding_that_grew_without_its_head_is_refused(place, tmp_path):
    model = load(place / "base")
    model.resize_token_embeddings(140)
    adapt(model, target_modules=["q_proj", "embed_tokens"]).save_pretrained(place / "grown")
    refused("with 140 rows, and not the other .*, which has 128 in .*live model", place / "grown", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"base_model_name_or_path": "me/nowhere"},
            "neither a folder nor in the Hub's cache; `hf download",
        ),
        ({"base_model_name_or_path": "nowhere"}, "neither a folder nor in the Hub's cache; name its folder"),
        ({"base_model_name_or_path": "runs/1/base"}, "neither a folder nor in the Hub's cache; name its folder"),
        ({"base_model_name_or_path": "/no/where"}, "the adapter's base /no/where is not there"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_a_base_that_is_not_there_is_asked_for(place, tmp_path, config, said):
    without(place / "run", **config)
    refused(said, place / "run", tmp_path / "out")


@pytest.mark.parametrize("option", [{"dtype": "float16"}, {"base": "nowhere"}, {"dtype": "no such"}])
def test_saving_an_adapter_takes_no_options_of_merging(place, tmp_path, option):
    refused(
        "saves the adapter as it is; leave out dtype and base", place / "run", tmp_path / "out", method="lora", **option
    )


def test_a_folder_without_a_model_is_told(place, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("empty holds no model", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    refused(r"pytorch_model\.bin is no safetensors file; load it with", tmp_path / "empty", tmp_path / "out")
    shutil.copytree(place / "run", tmp_path / "named" / "mine")
    refused("named holds no model: it is in .*named/mine, which can", tmp_path / "named", tmp_path / "out")
    (place / "run" / "adapter_model.safetensors").rename(place / "run" / "adapter_model.bin")
    refused(r"adapter_model\.bin is no safetensors file; load it with Peft", place / "run", tmp_path / "out")
    refused("a base .* goes with an adapter", place / "base", tmp_path / "out", base=place / "base")


@pytest.mark.slow
def test_an_interrupt_keeps_whole_shards_and_the_same_command_goes_on(made, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    code = f"""
import time
from pathlib import Path
from sloth_plugins import cli
from sloth_plugins.export import merging, writing
merging.merge.__kwdefaults__["shard_bytes"] = {SHARD // 4}
save = writing.save_shard
writing.save_shard = lambda *shard: (save(*shard), time.sleep(60))
cli.main()
"""
    command = [sys.executable, "-c", code, "export", "merged", str(made / "run"), "-o", str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and so may be the one that runs the tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not shards(partial) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert printed == ""
    assert said.splitlines()[-1].startswith("sloth-plugins: stopped; the shards in")
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert kept
    assert {path.name for path in partial.iterdir()} == {*kept, MARK}
    merge(made / "run", out, shard_bytes=SHARD // 4)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}.items()
    assert files(merge(made / "run", tmp_path / "again", shard_bytes=SHARD // 4)) == files(out)
