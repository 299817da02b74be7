"""Instruction and response pairs, read from the Python standard library's own signatures and docstrings.

The sources are parsed, never imported: some modules open windows or a browser, and parsing needs no permission to run.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip",
    "pydoc_data", "encodings", "this", "antigravity",
}  # fmt: skip
RESPONSE_CHARACTERS = (24, 1200)  # shorter says nothing; longer is cut at a paragraph
SIGNATURE_CHARACTERS = 160

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Pair(TypedDict):
    """One training example: a question about a name, and what its docstring answers."""

    instruction: str
    response: str


def standard_library_pairs(root: Path | None = None) -> list[Pair]:
    """All pairs of a library folder (this Python's own by default), in file order, without duplicates.

    Raises `RuntimeError` when the folder holds no documented source, as in a Python shipped without its `.py` files.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    pairs: list[Pair] = []
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        module = module_name(path.relative_to(folder))
        if module is None:
            continue
        for pair in module_pairs(module, path):
            if pair["instruction"] not in seen and pair["response"] not in seen:
                seen |= {pair["instruction"], pair["response"]}
                pairs.append(pair)
    if not pairs:
        raise RuntimeError(
            f"no documented Python source in {folder}: the demo makes its text from the standard library"
        )
    return pairs


def module_name(relative: Path) -> str | None:
    """The dotted name of a source file, or None for tests, private modules and files that are no module."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    wanted = all(part.isidentifier() and not part.startswith("_") and part not in EXCLUDED for part in parts)
    return ".".join(parts) if parts and wanted else None


def module_pairs(module: str, path: Path) -> Iterator[Pair]:
    """The pairs of one source file; none when this Python cannot parse it (some files are kept broken on purpose)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like, in sources that are not ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for name, node in documented(tree, module):
        response = first_paragraphs(ast.get_docstring(node, clean=False) or "")
        if len(response) >= RESPONSE_CHARACTERS[0]:
            yield {"instruction": f"What does {name} do? {signature(node)}", "response": response}


def documented(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Documented]]:
    """Public functions and classes below a module or class, with their dotted names; a function's inside is private."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Documented) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from documented(node, name)


def signature(node: Documented) -> str:
    """`Signature: (a, b=1) -> int` for a function, `Class: Name(Base)` for a class."""
    if isinstance(node, ast.ClassDef):
        return f"Class: {node.name}({', '.join(ast.unparse(base) for base in node.bases)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = f"Signature: ({ast.unparse(node.args)}){returns}"
    return text if len(text) <= SIGNATURE_CHARACTERS else text[: SIGNATURE_CHARACTERS - 4] + " ..."


def first_paragraphs(docstring: str) -> str:
    """As many whole paragraphs as fit the length limit; the first is cut at a word if it alone does not fit."""
    most = RESPONSE_CHARACTERS[1]
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    text = paragraphs[0].strip()
    if len(text) > most:
        return text[:most].rsplit(maxsplit=1)[0]
    for paragraph in paragraphs[1:]:
        if len(text) + len(paragraph) + 2 > most:
            break
        text = f"{text}\n\n{paragraph.rstrip()}"
    return text.strip()
