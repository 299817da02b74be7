"""Interruptions: what is done is kept, and the result is that of one run."""

import pytest
from tiny_models import save_model

from sloth_plugins.quantization import calibration, measure, quantize
from sloth_plugins.quantization.streaming import Streamed


@pytest.fixture
def stops_at(monkeypatch):
    """Loading a decoder layer for the n-th time is where the user presses Ctrl-C; and which layers were loaded."""
    loaded, real = [], Streamed.layer
    limit = [0]

    def layer(self, index):
        loaded.append(index)
        if len(loaded) == limit[0]:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(Streamed, "layer", layer)

    def arrange(count):
        loaded.clear()
        limit[0] = count
        return loaded

    return arrange


def without_place(measurement):
    return measurement.linears, measurement.other_bytes, measurement.tokens


@pytest.mark.parametrize("when", range(1, 7))
def test_a_pass_goes_on_where_it_stopped(model, tmp_path, options, stops_at, when):
    stops_at(0)
    whole = measure(model, cache=tmp_path / "one", **options)
    stops_at(when)
    with pytest.raises(KeyboardInterrupt):
        measure(model, cache=tmp_path / "two", **options)
    loaded = stops_at(0)
    again = measure(model, cache=tmp_path / "two", **options)
    assert without_place(again) == without_place(whole)
    assert loaded == [0, 1, 2, 2, 1, 0][when - 1 :]
    (folder,) = (path for path in (tmp_path / "two").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.safetensors", "measured.json"]


def test_the_slow_truth_goes_on_too(model, tmp_path, options, stops_at):
    stops_at(0)
    whole = measure(model, score="kl", cache=tmp_path / "one", **options)
    stops_at(9)
    with pytest.raises(KeyboardInterrupt):
        measure(model, score="kl", cache=tmp_path / "two", **options)
    loaded = stops_at(0)
    assert without_place(measure(model, score="kl", cache=tmp_path / "two", **options)) == without_place(whole)
    assert loaded[-1:] == [2]
    assert len(loaded) < 9


@pytest.mark.parametrize(("rounding", "layers"), [("nearest", []), ("calibrated", [0, 1, 2])])
def test_another_budget_is_not_measured_again(model, tmp_path, options, stops_at, rounding, layers):
    """Values alone are chosen for each."""
    options |= {"rounding": rounding}
    quantize(model, tmp_path / "ten", **options)
    loaded = stops_at(0)
    quantize(model, tmp_path / "twenty", budget="20%", **options)
    assert loaded == layers


@pytest.mark.parametrize("change", [{"samples": 5}, {"length": 33}, {"data": "text"}])
def test_other_text_or_another_model_is_another_measurement(model, tmp_path, options, stops_at, change):
    (tmp_path / "text").write_text("other text " * 100)
    change = {key: tmp_path / value if value == "text" else value for key, value in change.items()}
    measure(model, **options)
    loaded = stops_at(0)
    measure(model, **options | change)
    assert len(loaded) == 6


def test_a_model_that_was_trained_further_is_measured_again(tmp_path, options):
    save_model(tmp_path / "model")
    before = measure(tmp_path / "model", **options)
    save_model(tmp_path / "model", seed=1)
    assert measure(tmp_path / "model", **options).linears != before.linears


def test_nothing_is_under_its_name_when_writing_is_interrupted(model, tmp_path, options, monkeypatch):
    from sloth_plugins.quantization import checkpoint

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert [path.suffix for path in (tmp_path / "out.partial").glob("[!.]*")] == [".safetensors"]
    made = quantize(model, tmp_path / "out", **options)
    assert (made.folder / "quantization_report.json").is_file()
    assert not (tmp_path / "out.partial").exists()


def test_a_file_is_whole_once_it_has_its_name(tmp_path, monkeypatch):
    import torch
    from safetensors import torch as safetensors

    def half(tensors, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", half)
    work = calibration.Work(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.write("input-0", {"hidden": torch.zeros(2)})
    assert not work.has("input-0")
    assert list(tmp_path.iterdir()) == []
