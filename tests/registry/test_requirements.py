import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement

from sloth_plugins.registry import Unmet, first_unmet
from sloth_plugins.registry.requirements import malformed

INSTALLED = {"torch": "2.13.0+cpu", "transformers": "5.24.0.dev0"}.get


def test_requirements_that_hold_answer_none():
    assert first_unmet(["torch>=2.8", "transformers>=4.57,<6"], INSTALLED) is None
    assert first_unmet([], INSTALLED) is None


def test_the_first_that_does_not_hold_is_named_with_what_was_found():
    answer = first_unmet(["torch>=2.8", "transformers<5", "peft"], INSTALLED)
    assert answer == Unmet(required="transformers<5", found="5.24.0.dev0")


def test_a_missing_distribution_is_not_installed():
    assert first_unmet(["peft>=0.18"], INSTALLED) == Unmet("peft>=0.18", "not installed")


def test_a_local_version_counts_as_its_release():
    assert first_unmet(["torch==2.13.0"], INSTALLED) is None


def test_a_marker_for_another_machine_always_holds():
    assert first_unmet(["nowhere>=1; python_version < '3'"], INSTALLED) is None
    assert first_unmet(["nowhere>=1; python_version > '3'"], INSTALLED) == Unmet(
        "nowhere>=1; python_version > '3'", "not installed"
    )


def is_requirement(text):
    try:
        Requirement(text)
    except InvalidRequirement:
        return False
    return True


PIECES = [
    "torch",
    "a.b-c",
    "_x",
    ">=",
    "==",
    "<",
    "~=",
    "!=",
    "1",
    "2.8",
    "2.0rc1",
    "1.dev0",
    ",",
    " ",
    "*",
    ";",
    "-",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_the_short_cut_admits_only_what_packaging_admits(text):
    assert (malformed(text) is None) == is_requirement(text)


@pytest.mark.parametrize("text", ["torch", "torch>=2.8", "transformers>=4.57.6,<6", "a!=1.0rc1", "x==1.0.dev2"])
def test_usual_requirements_take_the_short_cut(text, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert malformed(text) is None
