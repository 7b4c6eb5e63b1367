"""Who may import whom: the rooms of docs/architecture.md, read from the imports of every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import denoised

ROOT = Path(denoised.__file__).parent
# From the ground up: a room imports rooms below its own, and its own.
FLOORS = (
    ("__init__",),
    ("request", "lora_request", "outputs", "config", "rules", "errors", "env", "checks"),
    ("hf",),
    ("spec",),
    ("steps", "attention"),
    ("features", "models"),
    ("runtime",),
    ("media",),
    ("server",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of our own modules that a file imports, inside functions too, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def ours(file: Path) -> Iterator[list[str]]:
    for name in imports(ast.parse(file.read_text())):
        parts = name.split(".")
        if parts[0] == "denoised":
            yield parts[1:]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    for parts in ours(file):
        target = parts[0] if parts and parts[0] in FLOOR else "__init__"
        assert FLOOR[target] <= FLOOR[room(file)], f"{room(file)} may not import {target}"


def test_features_do_not_import_each_other() -> None:
    for file in (ROOT / "features").glob("*.py"):
        assert not [parts for parts in ours(file) if parts[0] == "features" and parts[1:2] != [file.stem]], file


LIBRARY = r"(?:diffusers|transformers)\S*"
PRIVATE = re.compile(rf"(?:from|import)\s+{LIBRARY}\._\w|from {LIBRARY} import .*\b_\w")


@pytest.mark.parametrize("file", [f for f in FILES if room(f) != "hf"], ids=lambda f: str(f.relative_to(ROOT)))
def test_only_hf_names_private_symbols(file: Path) -> None:
    text = file.read_text()
    assert not PRIVATE.search(text)
    assert not re.search(r"\b(?:pipeline|pipe|own)\._[a-z]\w*", text), "ask hf for private parts of pipelines"
