"""What is said of runs: ratios only where they are clear and the losses agree."""

import json
import math

import pytest

from sloth_plugins.bench.picture import draw
from sloth_plugins.bench.results import STUDENT, Run, Variant, as_json, loss_difference, ratio, table, verdict

GIB = 2**30


def variant(name, *milliseconds, losses=(2.0, 1.5), peak=GIB):
    return Variant(name, [Run([ms / 1000] * 10, list(losses), peak) for ms in milliseconds])


def failed(name):
    return Variant(name, [Run(failed="out of memory")])


def test_the_first_steps_are_not_counted():
    assert Run([9.0, 9.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 3.0]).seconds == 2.0
    assert Run([9.0, 2.0]).seconds == 2.0
    assert Run([9.0]).seconds == 9.0


def test_a_clear_ratio_is_the_median_of_the_rounds():
    stock, patched = variant("stock", 100, 102, 110), variant("patched", 50, 50, 55)
    found = ratio(patched, stock)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.04))
    assert verdict(patched, stock, "float32").text == "2.00 times as fast (2.00 to 2.04)"


@pytest.mark.parametrize(
    "times",
    [
        (90, 110, 95),  # once slower, twice faster
        (100, 100, 100),
        (98, 90, 80),  # always faster, but by 2 to 25 percent
        (120, 105, 150),
        (61, 58, 130),
        (57, 76),  # two rounds may agree so by chance
    ],
)
def test_a_ratio_that_the_spread_hides_is_not_said(times):
    stock, other = variant("stock", *(100 for _ in times)), variant("patched", *times)
    said = verdict(other, stock, "float32")
    assert said.ratio is None
    assert said.agrees
    assert said.text.startswith("no ratio: the rounds give ")


def test_the_bound_is_student_s():
    """Logarithms of 1 +- 0.4: the interval is 1 +- 5.1 with two rounds, and 1 +- 0.46 with six."""
    two = [100 * math.exp(-1 - 0.4), 100 * math.exp(-1 + 0.4)]
    assert not ratio(variant("patched", *two), variant("stock", 100, 100)).is_clear
    assert ratio(variant("patched", *two * 3), variant("stock", *[100] * 6)).is_clear
    for freedom, bound in enumerate(STUDENT, 1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        xs = [(n + 0.5) * bound / 10_000 for n in range(10_000)]
        inside = sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs) * bound / 10_000
        assert 2 * inside == pytest.approx(0.95, abs=1e-4)


def test_slower_is_said_too():
    said = verdict(variant("liger", 200, 201), variant("stock", 100, 100), "float32")
    assert said.text == "0.50 times as fast (0.50 to 0.50)"


def test_what_slows_a_round_slows_both_and_hides_nothing():
    assert verdict(variant("patched", 50, 100, 75), variant("stock", 100, 200, 150), "float32").ratio.value == 2.0


def test_one_round_gives_no_ratio():
    assert (
        verdict(variant("patched", 50), variant("stock", 100), "float32").text == "no ratio: one round shows no spread"
    )


@pytest.mark.parametrize(
    ("losses", "dtype", "agrees"),
    [
        ((2.0, 1.5005), "float32", True),
        ((2.0, 1.51), "float32", False),
        ((2.0, 1.51), "bfloat16", True),
        ((2.0, 1.6), "bfloat16", False),
        ((2.0,), "bfloat16", False),
        ((2.0, math.nan), "bfloat16", False),
        ((), "float32", False),
    ],
)
def test_other_losses_are_another_computation(losses, dtype, agrees):
    stock, other = variant("stock", 100, 100), variant("patched", 50, 50, losses=losses)
    said = verdict(other, stock, dtype)
    assert said.agrees == agrees
    assert (said.ratio is not None) == agrees
    assert math.isfinite(loss_difference(other, stock)) == (len(losses) == 2 and all(map(math.isfinite, losses)))


def test_the_table_and_the_json_say_the_same():
    found = [variant("stock", 100, 104), variant("patched", 50, 52, peak=GIB // 2), variant("liger", 80, 140)]
    found.append(failed("unsloth"))
    rows = {row[0]: row[1:] for row in table(found, "float32", 1000)}
    assert rows["stock"] == ("102.0", "3.9%", "9,804", "1.00", "", "")
    assert rows["patched"] == ("51.0", "3.9%", "19,608", "0.50", "0.0e+00", "2.00 times as fast (2.00 to 2.00)")
    assert rows["liger"][-1] == "no ratio: the rounds give 0.74 to 1.25"
    assert rows["unsloth"] == ("out of memory", "", "", "", "", "")
    entries = {entry["variant"]: entry for entry in json.loads(json.dumps(as_json(found, "float32", 1000)))}
    assert entries["patched"]["ratio"]["value"] == 2.0
    assert entries["patched"]["verdict"] == rows["patched"][-1]
    assert entries["liger"]["ratio"] is None
    assert entries["unsloth"]["failed"] == "out of memory"
    assert "ratio" not in entries["stock"]
    assert len(entries["stock"]["runs"][1]["step_seconds"]) == 10


def test_where_stock_does_not_fit_the_others_are_still_shown(tmp_path):
    found = [failed("stock"), variant("patched", 50, 52)]
    rows = table(found, "float32", 1000)
    assert rows[1][1] == "out of memory"
    assert rows[2][-1] == "nothing to compare with"
    assert "ratio" not in as_json(found, "float32", 1000)[1]
    assert draw(tmp_path / "bench.png", found, "title")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]
