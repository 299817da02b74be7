"""Who may import whom, as the table in CONTRIBUTING.md has it; read from the source, nothing is run."""

import ast
from pathlib import Path

import pytest
from paths import ROOT

HEAVY = {"torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets"}
# folder: (what it may import at module level beside the standard library, what it may never import at all)
LAYERS = {
    "registry": ({"pluggy", "packaging", "sloth_plugins.registry"}, HEAVY | {"sloth_plugins"}),
    "patches/kernels": (
        {"torch", "triton", "sloth_plugins.patches.kernels"},
        {"transformers", "peft", "sloth_plugins"},
    ),
    "patches/blocks": (
        {"torch", "sloth_plugins.patches.kernels", "sloth_plugins.patches.blocks"},
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/losses": (
        {"torch", "sloth_plugins.patches.kernels", "sloth_plugins.patches.losses"},
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/checkpointing": (
        {
            "torch",
            "sloth_plugins.patches.kernels",
            "sloth_plugins.patches.blocks",
            "sloth_plugins.patches.checkpointing",
        },
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/generation": (
        {
            "torch",
            "sloth_plugins.patches.kernels",
            "sloth_plugins.patches.blocks",
            "sloth_plugins.patches.generation",
        },
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/forwards": (
        {
            "torch",
            "sloth_plugins.patches.kernels",
            "sloth_plugins.patches.blocks",
            "sloth_plugins.patches.losses",
            "sloth_plugins.patches.forwards",
        },
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/trainers": (
        {
            "torch",
            "sloth_plugins.patches.kernels",
            "sloth_plugins.patches.blocks",
            "sloth_plugins.patches.losses",
            "sloth_plugins.patches.checkpointing",
            "sloth_plugins.patches.generation",
            "sloth_plugins.patches.trainers",
        },
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches/rollouts": (
        {
            "torch",
            "sloth_plugins.patches.kernels",
            "sloth_plugins.patches.trainers",
            "sloth_plugins.patches.rollouts",
        },
        {"transformers", "peft", "triton", "sloth_plugins"},
    ),
    "patches": ({"sloth_plugins.registry", "sloth_plugins.patches.conventions"}, HEAVY | {"sloth_plugins"}),
    "sloth_plugins/quantization": (
        {"torch", "typer", "sloth_plugins"},
        {"sloth_plugins.patches", "sloth_plugins.registry", "unsloth", "liger_kernel"},
    ),
    "sloth_plugins": (
        {"sloth_plugins", "pluggy", "packaging", "typer", "rich", "torch"},
        {"sloth_plugins.patches", "unsloth", "liger_kernel"},
    ),
}
# These stand where torch is already imported; all others must start without it.
NEED_TORCH = {"scoped.py", "application.py", "patching.py", "verification.py"}
# Programs of their own: they train a model, and nothing else of the package imports them at module level.
PROGRAMS = {"sloth_plugins/demo"}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "sloth_plugins" else ("sloth_plugins", *parts))


def layer_of(file):
    folder = file.relative_to(ROOT).parent.as_posix()
    while folder not in LAYERS:
        folder = folder.rpartition("/")[0]
    return folder


def sources():
    for top in ("registry", "patches", "sloth_plugins"):
        yield from sorted((ROOT / top).rglob("*.py"))


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(file):
    """(imported name, whether it runs when the module is imported) of every import statement."""
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]

    def walk(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, child.module] if child.module else base)
                yield from ((f"{module}.{alias.name}", at_import) for alias in child.names)
            elif not is_type_checking(child):
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_import and not inside)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), True)


def under(name, roots):
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_stdlib(name):
    import sys

    return name.split(".")[0] in sys.stdlib_module_names


FILES = [pytest.param(file, id=file.relative_to(ROOT).as_posix()) for file in sources()]


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_layer_may(file):
    allowed, forbidden = LAYERS[layer_of(file)]
    is_program = under(file.relative_to(ROOT).parent.as_posix(), PROGRAMS)
    for name, at_import in imports(file):
        if under(name, allowed) and not (under(name, forbidden) and not under(name, allowed - {"sloth_plugins"})):
            continue
        assert not under(name, forbidden), f"{name} is another layer's"
        assert is_stdlib(name) or not at_import or is_program, f"{name} must be imported where it is used"


@pytest.mark.parametrize("file", FILES)
def test_no_file_uses_a_name_that_exists_only_in_the_repository(file):
    assert not [name for name, _ in imports(file) if under(name, {"registry", "patches"})]


def test_only_modules_that_meet_models_import_torch_at_once():
    found = {
        file.name
        for file in (ROOT / "sloth_plugins").glob("*.py")
        if any(at_import and under(name, {"torch"}) for name, at_import in imports(file))
    }
    assert found == NEED_TORCH


@pytest.mark.parametrize(
    "source", ["import transformers", "from sloth_plugins.discovery import plugins", "import torch"]
)
def test_a_breach_is_seen(tmp_path, monkeypatch, source):
    import test_layering

    (tmp_path / "registry").mkdir()
    file = tmp_path / "registry" / "new.py"
    file.write_text(f"def late():\n    {source}\n")
    monkeypatch.setattr(test_layering, "ROOT", Path(tmp_path))
    with pytest.raises(AssertionError, match="another layer's"):
        test_a_file_imports_only_what_its_layer_may(file)


def test_files_stay_small():
    long = {file.name: count for file in sources() if (count := len(file.read_text().splitlines())) > 420}
    assert long == {}
