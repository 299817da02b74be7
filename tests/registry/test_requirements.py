from sloth_plugins.registry import Unmet, first_unmet

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
