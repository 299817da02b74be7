"""The matrix's own programs: the list of versions, the record, what is written from it, and what is resumed."""

import json
import re
import subprocess
import sys

import cells
import lock
import overlays
import render
import run
from paths import ROOT

from sloth_plugins.compatibility import verdict
from sloth_plugins.discovery import Plugins

RESULTS = json.loads((ROOT / "compat" / "results.json").read_text())
KNOWN = Plugins(load_entry_points=False)
CELLS = {(kind, patch) for _, kind, patch in cells.cell_names(KNOWN)}


def test_every_cell_of_every_pin_is_on_record_and_none_is_red():
    assert list(RESULTS) == list(overlays.pins())
    for pin, result in RESULTS.items():
        found = {(kind, patch) for kind, row in result["cells"].items() for patch in row}
        assert found == CELLS, pin
        for kind, row in result["cells"].items():
            for patch, cell in row.items():
                assert cell["state"] in ("green", "experimental", "unsupported"), (pin, kind, patch)
                assert (cell["state"] == "green") == (not cell["reason"]), (pin, kind, patch)


def test_every_pin_says_what_it_pairs_with():
    for name, pin in overlays.pins().items():
        packages = {re.split(r"[=<>]", requirement)[0] for requirement in pin["pairs"]}
        assert {"peft", "trl", "accelerate"} <= packages
        assert {"transformers", "peft", "trl", "accelerate", "torch"} <= RESULTS[name]["versions"].keys()
        if name != "latest":
            assert RESULTS[name]["versions"]["transformers"] == name
            assert all("==" in requirement for requirement in pin["pairs"])
    assert [pin["ci"] for pin in overlays.pins().values() if "ci" in pin] == ["together", "together", "all"]


def test_what_is_written_from_the_record_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "compat" / "render.py"), "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stale_table_is_told(monkeypatch, capsys, tmp_path):
    changed = json.loads(json.dumps(RESULTS))
    changed["5.17.0"]["cells"]["llama"]["rope"] = {"state": "experimental", "reason": "tried once"}
    (tmp_path / "results.json").write_text(json.dumps(changed))
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results.json")
    assert render.main(["--check"]) == 1
    assert "README.md is not what compat/render.py writes" in capsys.readouterr().out
    assert "llama rope tried once" in render.table(changed)
    assert "experimental (tried once)" in render.shipped(changed)


def test_the_verdict_of_a_version():
    assert verdict("llama", "rope", "5.17.0") == "green on 5.17.0"
    assert verdict("qwen2_5_vl_text", "rope", "4.57.6").startswith("unsupported (needs transformers>=5.17")
    assert verdict("llama", "rope", "5.18.0") == "5.18.0 is not in the matrix"
    assert verdict("somebody", "rope", "5.18.0") == ""


def test_a_cell_that_changed_its_state_is_named():
    changed = json.loads(json.dumps({"5.17.0": RESULTS["5.17.0"]}))
    assert run.differences(changed, RESULTS) == []
    changed["5.17.0"]["cells"]["llama"]["rope"] = {"state": "red", "reason": "losses: 1e-2 from stock"}
    del changed["5.17.0"]["cells"]["phi"]["mlp"]
    lines = run.differences(changed, RESULTS)
    assert lines == [
        "5.17.0 llama rope: red, recorded as green. losses: 1e-2 from stock",
        "5.17.0 phi mlp: recorded, but no such cell was run",
    ]


def test_of_a_pin_with_few_cells_the_others_are_not_missed():
    few = cells.few_of(run.all_cells())
    assert ("llama", "llama", cells.TOGETHER) in few
    assert any(architecture == "trainer" for architecture, _, _ in few)
    assert not any(patch in ("rope", "blocks") for _, _, patch in few)
    ran = {"5.17.0": {**RESULTS["5.17.0"], "cells": {}}}
    for _, kind, patch in few:
        ran["5.17.0"]["cells"].setdefault(kind, {})[patch] = RESULTS["5.17.0"]["cells"][kind][patch]
    assert len(run.differences(ran, RESULTS)) == len(run.all_cells()) - len(few)
    assert run.differences(ran, RESULTS, few={"5.17.0"}) == []
    del ran["5.17.0"]["cells"]["phi"][cells.TOGETHER]
    assert run.differences(ran, RESULTS, few={"5.17.0"}) == [
        "5.17.0 phi all together: recorded, but no such cell was run"
    ]


def test_a_pin_that_is_not_there_is_one_line():
    done = subprocess.run([sys.executable, str(ROOT / "compat" / "run.py"), "5.17"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no pin '5.17' in compat/matrix.toml" in done.stdout
    assert "did you mean 5.17.0?" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    file = tmp_path / "cells.jsonl"
    monkeypatch.setattr(cells.Matrix, "names", lambda self: [("llama", "llama", "a"), ("llama", "llama", "b")])
    ran = []
    monkeypatch.setattr(cells.Matrix, "run", lambda self, a, k, p: ran.append(p) or cells.Cell(k, p))
    done = json.dumps({"model_type": "llama", "patch": "a", "state": "green"})
    file.write_text(done + '\n{"model_type": "llama", "pat')  # it was stopped in the middle of a line
    assert cells.main(file) == 0
    assert ran == ["b"]
    assert [cell["patch"] for cell in run.read_cells(file)] == ["a", "b"]


def test_parts_make_a_whole_and_keep_model_types_together():
    names = cells.cell_names(KNOWN)
    parts = [cells.part_of(names, part, 3) for part in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    kinds = [{kind for _, kind, _ in part} for part in parts]
    assert not kinds[0] & kinds[1] | kinds[0] & kinds[2] | kinds[1] & kinds[2]


def test_the_lock_holds_the_code_of_every_fingerprint():
    content = lock.read()
    used = {found for known in content["objects"].values() for found in known}
    assert used == content["sources"].keys()
    versions = set(overlays.pins()) - {"latest"}
    for path, known in content["objects"].items():
        tested = " ".join(known.values()).split()
        assert set(tested) <= versions
        assert len(tested) == len(set(tested)), path
    attention = content["objects"]["transformers.models.llama.modeling_llama:LlamaAttention"]
    assert len(attention) >= 3, "its body changed with cache_position and with the lookup of attention functions"


def test_a_result_depends_on_all_that_runs(monkeypatch, tmp_path):
    before = overlays.source_key()
    copied = tmp_path / "copy"
    for name in (*overlays.SOURCES, "compat/upstream.lock"):
        source, target = ROOT / name, copied / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    monkeypatch.setattr(overlays, "ROOT", copied)
    assert overlays.source_key() == before
    (copied / "sloth_plugins" / "compatibility.json").write_text("{}")
    assert overlays.source_key() == before, "the record of results does not decide results"
    with (copied / "patches" / "qwen.py").open("a") as file:
        file.write("\n")
    assert overlays.source_key() != before
