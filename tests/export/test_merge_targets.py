"""Where a merge is written: what is replaced, what stays, what a failed rename leaves, empty folders and links."""

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
from adapted_models import adapt, load, tokenizer, without
from folders import SHARD, files, refused

from sloth_plugins.export import merge, writing
from sloth_plugins.export.marking import MARK


def test_an_earlier_export_stays_unless_forced(place, tmp_path):
    out = merge(place / "base", tmp_path / "out")
    before = files(out)
    refused(r"out exists; choose another folder, or replace it with --force", place / "run", out)
    assert files(out) == before
    without(place / "run", base_model_name_or_path=str(tmp_path / "gone"))
    refused("gone is not there; name the folder where it is now", place / "run", out, force=True)
    assert files(out) == before
    merge(place / "run", out, base=place / "base", force=True)
    assert files(out).keys() == before.keys()
    assert files(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]


def test_a_failed_replacement_leaves_the_old_export(place, tmp_path, fails_at_second):
    out = merge(place / "base", tmp_path / "out")
    before = files(out)
    fails_at_second(OSError(errno.EIO, "Input/output error"))
    refused("Input/output error", place / "run", out, force=True, shard_bytes=SHARD)
    assert files(out) == before


def test_force_replaces_no_folder_that_holds_something_else(place, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    refused(
        r"thesis holds chapter\.tex, which no export wrote, so it is not replaced",
        place / "run",
        tmp_path / "thesis",
        force=True,
    )
    (tmp_path / "file").write_text("")
    refused("is a file", place / "run", tmp_path / "file", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def tree(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (["config.json", "src/a.py"], "config.json"),
        (["adapter_config.json", "checkpoint-3/optimizer.pt"], "adapter_config.json"),
    ],
)
def test_force_replaces_nothing_that_no_export_wrote(place, tmp_path, content, named):
    for name in content:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("{}")
    before = tree(tmp_path / "other")
    refused(f"other holds {named}, which no export wrote", place / "run", tmp_path / "other", force=True)
    assert tree(tmp_path / "other") == before


@pytest.mark.parametrize("added", ["notes.txt", "checkpoint-3/optimizer.pt", "link"])
def test_force_replaces_no_export_that_something_was_put_into(place, tmp_path, added):
    out = merge(place / "base", tmp_path / "out")
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).symlink_to(place) if added == "link" else (out / added).write_text("mine")
    before = tree(out)
    refused(f"out holds {added}, which no export wrote", place / "run", out, force=True)
    assert tree(out) == before


def test_a_live_model_does_not_replace_the_run_that_it_was_loaded_from(place):
    from peft import PeftModel

    before = tree(place / "run")
    model = PeftModel.from_pretrained(load(place / "base"), place / "run")
    refused("run holds .*, which no export wrote", model, place / "run", force=True)
    assert tree(place / "run") == before


@pytest.mark.parametrize("beside", ["out.partial", "out.replaced"])
def test_folders_that_only_have_the_names_of_ours_stay(place, tmp_path, beside):
    out = merge(place / "base", tmp_path / "out")
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "thesis.txt").write_text("years of work")
    before = tree(out)
    refused(r"out\.partial holds thesis|out\.replaced is in the way", place / "run", out, force=True)
    assert (tmp_path / beside / "thesis.txt").read_text() == "years of work"
    assert tree(out) == before


def test_what_is_read_from_a_kept_folder_is_not_removed(place, tmp_path):
    merge(place / "base", tmp_path / "out").rename(tmp_path / "out.partial")
    merge(place / "base", tmp_path / "tokens", tokenizer())
    refused("tokens, which is read", place / "run", tmp_path / "tokens", tokenizer=tmp_path / "tokens", force=True)
    refused(r"out\.partial holds .*, which is read", tmp_path / "out.partial", tmp_path / "out")


@pytest.fixture
def no_rename_of(monkeypatch):
    """Give a folder's path to have its next rename refused."""

    def arrange(folder):
        real = Path.rename

        def rename(self, target):
            if self == folder:
                monkeypatch.setattr(Path, "rename", real)
                raise OSError(errno.EBUSY, "Device or resource busy")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)

    return arrange


def test_a_failed_rename_keeps_all_and_the_next_run_goes_on(place, tmp_path, no_rename_of):
    no_rename_of(tmp_path / "out.partial")
    refused(
        "cannot rename .*out.partial to .*out: Device or resource busy; all of it stays",
        place / "run",
        tmp_path / "out",
    )
    whole = files(tmp_path / "out.partial")
    written = (tmp_path / "out.partial" / "model.safetensors").stat().st_mtime_ns
    assert files(merge(place / "run", tmp_path / "out")) == whole
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written


def test_a_failed_replacement_s_rename_puts_the_old_export_back(place, tmp_path, no_rename_of):
    out = merge(place / "base", tmp_path / "out")
    before = files(out)
    no_rename_of(tmp_path / "out.partial")
    refused("Device or resource busy; all of it stays", place / "run", out, force=True)
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out", "out.partial"]
    merge(place / "run", out, force=True)
    assert files(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]


@pytest.mark.parametrize("live", [False, True])
def test_an_empty_folder_is_filled_and_not_replaced(place, tmp_path, monkeypatch, live):
    source = adapt(load(place / "base")) if live else place / "run"
    expected = files(merge(source, tmp_path / "expected"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    number = Path.cwd().stat().st_ino
    merge(source, ".")
    assert Path.cwd().stat().st_ino == number
    assert files(tmp_path / "empty") == expected
    refused("which cannot be replaced; empty it first", source, ".", force=True)
    assert files(tmp_path / "empty") == expected


def test_an_empty_folder_s_shards_stay_inside_for_the_next_run(place, tmp_path, fails_at_second, no_rename_of):
    (tmp_path / "out").mkdir()
    calls = fails_at_second(OSError(errno.ENOSPC, "No space left on device"))
    refused("the disk is full; what is complete is kept", place / "run", tmp_path / "out", shard_bytes=SHARD)
    no_rename_of(tmp_path / "out" / writing.INSIDE / "model-00001-of-00002.safetensors")
    refused("Device or resource busy; all of it stays", place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [writing.INSIDE]
    merge(place / "run", tmp_path / "out", shard_bytes=SHARD)
    assert len(calls) == 3, "no shard was written again"
    assert files(tmp_path / "out") == files(merge(place / "run", tmp_path / "again", shard_bytes=SHARD))


@pytest.fixture
def mounted(tmp_path):
    """An empty folder where a disk is mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_is_filled_where_it_is_mounted(place, tmp_path, mounted):
    merge(place / "run", mounted)
    assert mounted.is_mount()
    assert files(mounted) == files(merge(place / "run", tmp_path / "again"))
    refused("is a mount point or the present folder", place / "base", mounted, force=True)
    assert files(mounted) == files(tmp_path / "again")


@pytest.mark.parametrize("there", ["empty", "dangling", "export"])
def test_a_link_stays_and_leads_to_the_export(place, tmp_path, there):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "model"
    if there == "export":
        merge(place / "base", target)
    elif there == "empty":
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    merge(place / "run", tmp_path / "link", force=there == "export")
    assert (tmp_path / "link").is_symlink()
    assert files(target) == files(merge(place / "run", tmp_path / "again"))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize("target", ["run", "base", ""])
def test_what_is_read_is_not_replaced(place, target):
    refused("which is read; choose another folder", place / "run", place / target, force=True)


def test_two_runs_do_not_write_one_folder(place, tmp_path):
    with writing.Staged(tmp_path / "out", None).open() as folder:
        (folder / "file").touch()
        refused("out.partial is being written by another process", place / "run", tmp_path / "out")
    assert files(tmp_path / "out").keys() == {"file", MARK}
