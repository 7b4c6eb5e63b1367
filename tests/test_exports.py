"""The public names: sorted, importable, typed the same as they are found, and cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import denoised


def test_public_names_are_sorted_and_importable() -> None:
    assert denoised.__all__ == sorted(denoised.__all__)
    for name in denoised.__all__:
        assert getattr(denoised, name).__name__ == name
        assert name in dir(denoised)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(denoised.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == denoised._HOMES
    assert set(seen) == set(denoised.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Onmi'"):
        denoised.Onmi  # noqa: B018


@pytest.mark.parametrize("statement", ["import denoised", "import denoised.cli", "from denoised import Omni"])
def test_import_is_light(statement: str) -> None:
    code = (
        f"import sys; {statement}; print({{'torch', 'numpy', 'diffusers', 'transformers', 'PIL'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
