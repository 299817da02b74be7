"""Pushing to a Hub that runs here: what arrives, what is sent twice, what the card says, where the token goes."""

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from adapted_models import adapt, load, save_base, tokenizer, without
from local_hub import serving
from transformers import __version__ as transformers

from sloth_plugins._version import __version__
from sloth_plugins.errors import SlothError
from sloth_plugins.export import merge, push, push_to_hub_gguf, push_to_hub_merged
from sloth_plugins.export.marking import MARK

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    save_base(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    adapt(load(folder / "base")).save_pretrained(folder / "run")
    merge(folder / "run", folder / "merged", shard_bytes=100_000)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, file_download

    with serving() as (server, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for place in (constants, file_download):  # where huggingface_hub 1 and 0 read it
            monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        server.address = address
        yield server


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


def oid(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_arrives_as_it_is(made, hub):
    assert push(made / "merged", "me/tiny", token=TOKEN, private=True) == f"{hub.address}/me/tiny"
    assert hub.files("me/tiny") == content(made / "merged")
    assert hub.repos["me/tiny"]["private"] is True
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_an_interrupted_upload_goes_on_without_sending_again_what_arrived(made, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    first, second = sorted((made / "merged").glob("*.safetensors"))

    def in_order(action):
        return action["oid"] == oid(second)

    # One file after the other, so that the first has arrived when the line breaks in the middle of the second.
    for one_by_one in ("utils.hf_thread_map", "_commit_api.thread_map"):  # of huggingface_hub 1 and 0
        monkeypatch.setattr(
            f"huggingface_hub.{one_by_one}",
            lambda function, items, **_: list(map(function, sorted(items, key=in_order))),
            raising=False,
        )
    hub.breaks = {oid(second)}
    with pytest.raises(
        SlothError, match=r"the Hub did not take me/tiny: .*run it again, and what has arrived"
    ) as broken:
        push(made / "merged", "me/tiny", token=TOKEN)
    assert "\n" not in str(broken.value)
    assert (oid(first), first.stat().st_size) in hub.received
    assert any(name == oid(second) and size < second.stat().st_size for name, size in hub.received)
    assert hub.files("me/tiny") == {}
    hub.breaks, hub.refuses, hub.received = set(), None, []
    push(made / "merged", "me/tiny", token=TOKEN)
    assert hub.received == [(oid(second), second.stat().st_size)]
    assert hub.files("me/tiny") == content(made / "merged")


@pytest.mark.parametrize("source", ["run", "live"])
def test_a_model_is_merged_pushed_and_leaves_nothing_behind(made, hub, tmp_path, source):
    model = made / "run" if source == "run" else adapt(load(made / "base"))
    push_to_hub_merged(model, "me/tiny", tokenizer(), token=TOKEN, datasets=["me/data"])
    files = dict(hub.files("me/tiny"))
    card = files.pop("README.md").decode()
    expected = content(merge(model, tmp_path / "expected", tokenizer()))
    del expected["README.md"]
    assert files == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["expected"]
    for said in (
        "- me/data",
        "- sloth-plugins",
        f"sloth-plugins {__version__}",
        f"transformers {transformers}",
        "LoRA r=4, alpha=8",
    ):
        assert said in card
    assert "merged, 16bit" in card
    assert str(made) not in card
    assert "base, fine-tuned" in card


def test_a_second_call_sends_nothing_that_is_there(made, hub):
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    before = len(hub.received)
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    assert len(hub.received) == before


def test_the_card_names_base_data_and_patches(made, hub, tmp_path):
    import sloth_plugins

    run = shutil.copytree(made / "run", tmp_path / "run")
    without(run, base_model_name_or_path="me/base")
    (run / "README.md").write_text("---\ndatasets:\n- me/theirs\n---\n# run\n")
    push_to_hub_merged(run, "me/tiny", token=TOKEN, base=made / "base")
    card = hub.files("me/tiny")["README.md"].decode()
    for said in ("base_model: me/base", "- me/theirs", "[me/base](https://huggingface.co/me/base)"):
        assert said in card
    model = adapt(load(made / "base"))
    sloth_plugins.patch(model, "llama:rms_norm")
    push_to_hub_merged(model, "me/live", token=TOKEN)
    assert "| Patches | rms_norm (5 modules) |" in hub.files("me/live")["README.md"].decode()


def test_a_live_model_without_an_adapter_is_pushed(made, hub, tmp_path):
    push_to_hub_merged(load(made / "base"), "me/tiny", tokenizer(), token=TOKEN)
    assert hub.files("me/tiny").keys() == {*content(merge(made / "base", tmp_path / "expected", tokenizer()))}
    assert "Adapter" not in hub.files("me/tiny")["README.md"].decode()


def test_an_export_has_a_card_that_is_pushed_with_it(made, hub):
    push(made / "merged", "me/tiny", token=TOKEN)
    card = hub.files("me/tiny")["README.md"].decode()
    for said in (
        "library_name: transformers",
        "LoRA r=4",
        "merged, 16bit",
        "Patches | not stated: exported from a fol",
    ):
        assert said in card


def test_one_dataset_may_be_named_alone(made, hub):
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN, datasets="imdb")
    assert "datasets:\n- imdb\n" in hub.files("me/tiny")["README.md"].decode()


def test_the_card_names_kinds_of_layers_once(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in ("q_proj", "v_proj")]
    without(run, target_modules=names)
    (run / "README.md").write_text("---\ndatasets: [\n---\n")
    card = (merge(run, tmp_path / "out", method="lora") / "README.md").read_text()
    assert "alpha=8 on q_proj, v_proj |" in card
    assert "library_name: peft" in card


def test_somebody_s_own_card_stays(made, hub, tmp_path):
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    hub.files("me/tiny")["README.md"] = b"# By hand\n"
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    assert hub.files("me/tiny")["README.md"] == b"# By hand\n"


def test_the_token_goes_nowhere_else(made, hub, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    hub.refuses = f"bad token {TOKEN}"
    with pytest.raises(SlothError, match=r"the Hub did not take me/tiny: .*bad token \*\*\*") as refused:
        push(made / "merged", "me/tiny", token=TOKEN)
    printed = "".join(capfd.readouterr())
    assert TOKEN not in printed + caplog.text + str(refused.value)
    assert refused.value.__cause__ is None
    assert all(TOKEN.encode() not in file for file in hub.files("me/tiny").values())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_public_repository_is_not_taken_for_a_private_one(made, hub):
    push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    before = len(hub.received), dict(hub.files("me/tiny"))
    with pytest.raises(SlothError, match="me/tiny exists and is public; make it private"):
        push(made / "merged", "me/tiny", token=TOKEN, private=True)
    assert (len(hub.received), hub.files("me/tiny")) == before
    push(made / "merged", "me/mine", token=TOKEN, private=True)
    push(made / "merged", "me/mine", token=TOKEN, private=True)


@pytest.mark.parametrize("kind", ["merged", "gguf"])
@pytest.mark.parametrize(
    ("repo", "private", "refuses", "said"),
    [
        ("me/new", None, "bad token", "the Hub did not take me/new: .*bad token"),
        ("me/there", None, "bad token", "the Hub did not take me/there: .*bad token"),
        ("me/there", True, None, "me/there exists and is public"),
        ("no such/name!", None, None, "the Hub did not take no such/name!: "),
    ],
)
def test_the_hub_is_asked_before_anything_is_made(made, hub, monkeypatch, kind, repo, private, refuses, said):
    from huggingface_hub import HfApi

    from sloth_plugins.export import gguf, merging

    if repo == "me/there" and refuses and "write" not in signature(HfApi.auth_check).parameters:
        pytest.skip("this release of huggingface_hub cannot ask whether a token may write")

    def never(*_, **__):
        pytest.fail("made before the Hub was asked")

    monkeypatch.setattr(merging, "merge", never)
    monkeypatch.setattr(gguf, "export", never)
    push(made / "merged", "me/there", token=TOKEN)
    hub.refuses = refuses
    pushed = {"merged": push_to_hub_merged, "gguf": push_to_hub_gguf}[kind]
    with pytest.raises(SlothError, match=said) as refused:
        pushed(made / "run", repo, token=TOKEN, private=private)
    assert "run it again" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(Path.cwd().glob(".sloth-plugins-*"))


def test_a_source_that_is_not_there_makes_no_repository(made, hub):
    with pytest.raises(SlothError, match="nowhere is no folder"):
        push_to_hub_merged(made / "nowhere", "me/tiny", token=TOKEN)
    assert hub.repos == {}


def test_a_present_folder_that_may_not_be_written_is_told(made, hub, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(SlothError, match=r"cannot write .*: Permission denied; .* go to another folder"):
        push_to_hub_merged(made / "run", "me/tiny", token=TOKEN)
    assert hub.repos == {}


def test_a_hub_that_is_not_there_is_one_line(made, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(SlothError, match=r"the Hub did not take me/tiny: .*refused"):
        push(made / "merged", "me/tiny", token=TOKEN)
    with pytest.raises(SlothError, match="nowhere is no folder"):
        push(made / "nowhere", "me/tiny")


def test_gguf_files_are_pushed_with_a_card(made, hub, tmp_path, monkeypatch):
    from sloth_plugins.export import gguf

    def export(source, out, tokenizer, methods, **options):
        out.mkdir()
        (out / "model-q8_0.gguf").write_bytes(b"GGUF")
        return gguf.Exported([out / "model-q8_0.gguf"])

    monkeypatch.setattr(gguf, "export", export)
    push_to_hub_gguf(made / "run", "me/tiny", tokenizer(), "q8_0", token=TOKEN)
    files = hub.files("me/tiny")
    assert files["model-q8_0.gguf"] == b"GGUF"
    assert b"library_name: gguf" in files["README.md"]
    assert b"GGUF for llama.cpp and Ollama: model-q8_0.gguf" in files["README.md"]


@pytest.mark.slow
def test_the_command_pushes_with_the_token_of_the_environment(made, hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [str(Path(sys.executable).with_name("sloth-plugins")), "export", "push", str(made / "merged"), "me/tiny"]
    done = subprocess.run(
        command, env=environment | {"HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{hub.address}/me/tiny\n", "")
    assert hub.files("me/tiny") == content(made / "merged")
    assert hub.tokens == {f"Bearer {TOKEN}"}
