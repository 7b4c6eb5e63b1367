"""Each private symbol that hf.py leans on exists in the installed diffusers and transformers."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from denoised import hf

TREE = ast.parse(Path(hf.__file__).read_text())
IMPORTED = sorted(
    (node.module, alias.name)
    for node in ast.walk(TREE)
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("diffusers", "transformers")
    for alias in node.names
)
PRIVATE = sorted(
    {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr.startswith("_") and n.attr[1] != "_"}
)


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_imported_name_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_attribute_exists(name: str) -> None:
    import diffusers

    homes = (diffusers.DiffusionPipeline, diffusers.SchedulerMixin, diffusers.ModelMixin)
    assert any(hasattr(home, name) for home in homes)


def test_methods_that_hf_calls_exist() -> None:
    import diffusers
    import transformers

    assert callable(diffusers.DiffusionPipeline.register_to_config)
    assert isinstance(inspect.getattr_static(diffusers.DiffusionPipeline, "components"), property)
    for library in (diffusers, transformers):
        assert callable(library.utils.logging.set_verbosity_error)
        assert callable(library.utils.logging.disable_progress_bar)
