"""Models that come quantized, as the libraries' own loaders take them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def holds_parts(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file says that its tensors are parts of quantized ones, as torchao writes them."""
    return bool(metadata) and "tensor_names" in (metadata or {})


def is_quantized(model: Any) -> bool:
    """Whether a component came quantized, by its own configuration."""
    return getattr(model, "hf_quantizer", None) is not None


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a configuration says of weights that come quantized: their names, and torchao's settings for them."""

    names: tuple[str, ...]
    settings: Any


def quantized_by(model: Any, config: Mapping[str, Any]) -> Quantized | None:
    """What the loader of a model's library would take as quantized; the model has no weights yet, and gets none.

    config: `quantization_config` in the model's configuration file. None: made by another library than torchao.
    Raises whatever settings that the libraries do not know make them raise.
    """
    import transformers

    if config.get("quant_method") != "torchao":
        return None
    found = copy.deepcopy(dict(config))  # the libraries write into lists of theirs
    is_theirs = isinstance(model, transformers.PreTrainedModel)
    return _of_transformers(model, found) if is_theirs else _of_diffusers(model, found)


def _of_diffusers(model: Any, config: dict[str, Any]) -> Quantized:
    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
    kept = list(model._keep_in_fp32_modules or ())
    quantizer._process_model_before_weight_loading(model, device_map=None, keep_in_fp32_modules=kept)
    names = [name for name, _ in model.named_parameters() if quantizer.check_if_quantized_param(model, None, name, {})]
    return Quantized(names=tuple(names), settings=quantizer.quantization_config.quant_type)


def _of_transformers(model: Any, config: dict[str, Any]) -> Quantized:
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    names = [name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)]
    return Quantized(names=tuple(names), settings=quantizer.quantization_config.quant_type)
