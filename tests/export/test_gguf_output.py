"""The folder that GGUF files go to: what was there, what is left where something goes wrong, what the command says."""

import errno
import shlex
import shutil
import sys
from types import SimpleNamespace

import gguf
import pytest
from gguf_tiny import left_in, tensors
from typer.testing import CliRunner

from sloth_plugins.errors import SlothError
from sloth_plugins.export import command
from sloth_plugins.export.gguf import export

EXPORT_MODULE = sys.modules[export.__module__]


def test_existing_files_are_kept_unless_forced(folder, tokenizer, tmp_path):
    export(folder, tmp_path, tokenizer, "f16")
    (tmp_path / "model-f16.gguf").write_text("precious")
    with pytest.raises(SlothError, match=r"/model-f16.gguf exists already; .*--force"):
        export(folder, tmp_path, tokenizer, ["q8_0", "f16"])
    assert (tmp_path / "model-f16.gguf").read_text() == "precious"
    assert not (tmp_path / "model-q8_0.gguf").exists()
    export(folder, tmp_path, tokenizer, "f16", force=True)
    assert len(tensors(tmp_path / "model-f16.gguf")) > 10


def test_another_method_needs_no_force_and_leaves_the_rest(folder, tokenizer, tmp_path):
    export(folder, tmp_path, tokenizer, "f16")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = export(folder, tmp_path, tokenizer, "q8_0")
    assert before.items() < {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
    assert left_in(tmp_path) == ["Modelfile", "model-f16.gguf", "model-q8_0.gguf"]
    assert made.modelfile is None
    kept = f"{tmp_path}/Modelfile is kept as it was; name model-q8_0.gguf in its FROM, or remove it"
    assert kept in made.notes
    (tmp_path / "Modelfile").unlink()
    assert export(folder, tmp_path, tokenizer, "bf16").modelfile.is_file()


def test_one_process_writes_at_a_time(folder, tokenizer, tmp_path, monkeypatch):
    wrote = EXPORT_MODULE.write

    def meanwhile(source, path, method):
        with pytest.raises(SlothError, match="is being written by another process"):
            export(folder, tmp_path, tokenizer, "bf16", force=True)
        wrote(source, path, method)

    monkeypatch.setattr(EXPORT_MODULE, "write", meanwhile)
    file = export(folder, tmp_path, tokenizer, "f16").files[0]
    assert len(tensors(file)) > 10
    assert left_in(tmp_path) == ["Modelfile", "model-f16.gguf"]


def test_a_damaged_generation_config_is_told_before(folder, tokenizer, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "generation_config.json").write_text("{")
    with pytest.raises(SlothError, match=r"generation_config\.json cannot be read"):
        export(damaged, tmp_path / "out", tokenizer, "f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_half_written_files_go(folder, tokenizer, tmp_path, monkeypatch, error):
    export(folder, tmp_path, tokenizer, "f16")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def write_tensor_data(self, data, **options):
        written.append(data)
        if len(written) > 5:
            raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_tensor_data)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SlothError
    with pytest.raises(expected, match="the disk is full" if expected is SlothError else None):
        export(folder, tmp_path, tokenizer, ["f16", "bf16"], force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_too_small_is_told_before(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SlothError, match=r"needs 0.0 GB, and 0.0 GB are free"):
        export(folder, tmp_path / "out", tokenizer, "q8_0")
    assert not (tmp_path / "out").exists()


def test_a_place_where_nothing_can_be_written(folder, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlothError, match=r"cannot write .*file/out: Not a directory"):
        export(folder, tmp_path / "file" / "out", tokenizer, "f16")


def test_the_modelfile_lies_beside(folder, tokenizer, tmp_path):
    made = export(folder, tmp_path, tokenizer, ["q8_0", "f16"])
    text = made.modelfile.read_text()
    assert text.startswith('FROM ./model-q8_0.gguf\nTEMPLATE """')
    assert "PARAMETER temperature 0.7\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    other = tmp_path / "other"
    assert export(folder, other, tokenizer, "f16", modelfile=False).modelfile is None
    assert left_in(other) == ["model-f16.gguf"]


def test_the_command_takes_commas_and_says_a_line_that_a_shell_takes(folder, tmp_path):
    out = tmp_path / "g [x] ü"
    done = CliRunner().invoke(command.app, ["gguf", str(folder), "-o", str(out), "--quant", "f16,q8_0"])
    assert done.exit_code == 0
    assert left_in(out) == ["Modelfile", "model-f16.gguf", "model-q8_0.gguf"]
    said = done.stdout.replace("\n", "").split("`")[1]
    assert shlex.split(said) == ["ollama", "create", "NAME", "-f", f"{out}/Modelfile"]
