"""Each private symbol that hf leans on exists in the installed diffusers and transformers."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from pathlib import Path

import pytest

from denoised import hf

FILES = sorted(Path(hf.__file__).parent.glob("*.py"))
NODES = [node for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
IMPORTED = sorted(
    (node.module, alias.name)
    for node in NODES
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("diffusers", "transformers")
    for alias in node.names
)


def _private() -> set[str]:
    """Attributes with one leading underscore that hf reads from what is not its own."""
    nodes = (node for node in NODES if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self")
    return {node.attr for node in nodes if node.attr.startswith("_") and not node.attr.startswith("__")}


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_imported_name_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", sorted(_private()))
def test_private_attribute_exists(name: str) -> None:
    import diffusers
    from diffusers.quantizers import DiffusersQuantizer
    from transformers.quantizers.base import HfQuantizer

    homes = (diffusers.DiffusionPipeline, diffusers.SchedulerMixin, diffusers.ModelMixin)
    quantizers = (DiffusersQuantizer, HfQuantizer)  # each is asked by this name
    assert any(hasattr(home, name) for home in homes) or all(hasattr(home, name) for home in quantizers)


def test_classes_still_declare_their_plans() -> None:
    """hf asks for them by name, because most classes have none."""
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    for cls in (FluxTransformer2DModel, QwenImageTransformer2DModel):
        assert cls._tp_plan
        assert cls._cp_plan


def test_methods_that_hf_calls_exist() -> None:
    import diffusers
    import transformers

    assert callable(diffusers.DiffusionPipeline.register_to_config)
    assert isinstance(inspect.getattr_static(diffusers.DiffusionPipeline, "components"), property)
    for library in (diffusers, transformers):
        assert callable(library.utils.logging.set_verbosity_error)
        assert callable(library.utils.logging.disable_progress_bar)


def test_expected_messages_alone_are_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    """Of what torchao says when it is imported, and of nothing else that is said in these places."""
    said = {
        "torchao": "Failed to load /lib/_C.so: no GPU",
        "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass and is now natively supported",
        "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects. This may",
    }
    for name, text in said.items():
        logger = logging.getLogger(name)
        before, logger.propagate = logger.propagate, True
        logger.warning(text)
        logger.warning("something else of %s", name)
        logger.propagate = before
    found = [record.getMessage() for record in caplog.records]
    assert not set(said.values()) & set(found)
    assert "something else of torchao" in found
