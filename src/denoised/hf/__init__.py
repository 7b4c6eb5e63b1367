"""The only package that names private symbols of diffusers and transformers, or leans on undocumented behaviour.

`tests/test_hf.py` asserts that each exists, so that an upgrade fails there and not in a picture.
"""

from __future__ import annotations

from denoised.hf.loading import (
    class_names,
    converted_single_file,
    empty_model,
    giving_components,
    kept_in_float32,
    opening_weights,
)
from denoised.hf.messages import expect_messages_of_imports, quietly, route_warnings
from denoised.hf.pipelines import (
    changes_modules,
    components,
    execution_device,
    inner_pipelines,
    output_class,
    reads_text,
    same_processors,
    set_config,
    stateful_components,
    subclasses,
    text_encoders,
)
from denoised.hf.plans import PlanEntry, context_parallel_plan, converted_lora, declared_cuts
from denoised.hf.quantized import Quantized, holds_parts, is_quantized, quantized_by
from denoised.hf.vaes import asks_itself, broken_tiling, keeps_features, wrap_forgetting

__all__ = [
    "PlanEntry",
    "Quantized",
    "asks_itself",
    "broken_tiling",
    "changes_modules",
    "class_names",
    "components",
    "context_parallel_plan",
    "converted_lora",
    "converted_single_file",
    "declared_cuts",
    "empty_model",
    "execution_device",
    "giving_components",
    "holds_parts",
    "inner_pipelines",
    "is_quantized",
    "keeps_features",
    "kept_in_float32",
    "opening_weights",
    "output_class",
    "quantized_by",
    "quietly",
    "reads_text",
    "route_warnings",
    "same_processors",
    "set_config",
    "stateful_components",
    "subclasses",
    "text_encoders",
    "wrap_forgetting",
]

expect_messages_of_imports()
