"""What README and CONTRIBUTING say is what the program does."""

import inspect
import re
import shlex

import pytest
from paths import ROOT
from typer.testing import CliRunner

from sloth_plugins import cli
from sloth_plugins.discovery import Plugins
from sloth_plugins.listing import entries
from sloth_plugins.registry import hookspecs
from sloth_plugins.selection import decide, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def between(text, name):
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def shell_lines():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


def test_every_hook_is_documented_with_its_signature():
    specs = {
        name: inspect.signature(function)
        for name, function in vars(hookspecs).items()
        if name.startswith("sloth_") and callable(function)
    }
    documented = dict(re.findall(r"^\| `(sloth_\w+)\((.*?)\)`", between(CONTRIBUTING, "hooks"), re.M))
    assert documented == {name: ", ".join(signature.parameters) for name, signature in specs.items()}
    for name in specs:
        assert len(inspect.getdoc(getattr(hookspecs, name)).split()) > 10


def test_the_table_of_patches_is_what_list_shows():
    lines = between(README, "list").splitlines()[2:]
    cells = [tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    assert cells == [entry.row for entry in entries(Plugins(load_entry_points=False))]


def test_the_example_is_the_plugin_that_is_tested():
    source = (ROOT / "tests" / "example_plugin" / "sloth_olmo.py").read_text(encoding="utf-8")
    assert between(README, "example") == f"```python\n{source}```"
    assert len(source.splitlines()) < 40


def test_every_command_of_ours_in_the_readme_exists():
    commands = {name or command.callback.__name__ for command in cli.app.registered_commands for name in [command.name]}
    groups = {group.name for group in cli.app.registered_groups}
    seen = set()
    for line in shell_lines():
        words = shlex.split(line)
        if words[0] == "sloth-plugins":
            seen.add(words[1])
            result = CliRunner().invoke(cli.app, [*words[1 : 3 if words[1] in groups else 2], "--help"])
            assert result.exit_code == 0
            options = re.findall(r"--[\w-]+", line)
            assert all(option in re.sub(r"\x1b\[[0-9;]*m", "", result.output) for option in options), line
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        else:
            assert words[0] in ("pip", "SLOTH_PLUGINS=1"), line
    assert seen <= commands | groups
    assert {"list", "plan", "doctor", "verify", "stats", "bench", "export"} <= seen


@pytest.mark.parametrize(
    ("text", "rms_norm", "glu", "other"),
    [
        ("off", False, False, False),
        ("1", True, True, True),
        ("llama", True, True, False),
        ("llama:rms_norm+rope", True, False, False),
        ("1,-*:glu", True, False, True),
        ("-llama", False, False, True),
    ],
)
def test_the_table_of_selections_means_what_it_says(text, rms_norm, glu, other):
    assert f"`{text}`" in README
    selection = parse(text)
    found = [
        decide(selection, *pair).selected for pair in (("llama", "rms_norm"), ("llama", "glu"), ("qwen", "qk_norm"))
    ]
    assert found == [rms_norm, glu, other]


def test_no_document_names_a_path_of_one_machine():
    for text in (README, CONTRIBUTING, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")):
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)
