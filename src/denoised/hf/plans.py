"""What a model's class declares about cutting it, and an adapter's tensors by the loader of its class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from denoised.hf.pipelines import components

# A layer that is two in one, whose halves are multiplied, and the one that takes the product. Classes declare them
# gathered and split again, because their own hooks would cut across the halves.
_HALVES = {"gate_up_proj": "colwise_gather_output", "down_proj": "rowwise_split_input"}


def declared_cuts(model: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """How a model's class says that tensor parallelism cuts its layers: path to (dimension of the weight, parts).

    Parts are lengths along that dimension, each cut on its own; they add up to it. Empty: the class says nothing.
    Embeddings and heads, which transformers cuts too, are left out.
    """
    styles = getattr(model, "_tp_plan", None) or {}
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in styles.items()]
    found = ((path, part, _style(patterns, path)) for path, part in model.named_modules() if hasattr(part, "weight"))
    return {path: _cut(part, style) for path, part, style in found if style is not None}


def _style(patterns: list[tuple[re.Pattern[str], Any]], path: str) -> Any:
    """The style of the first pattern that names the path, if it is one that divides a layer of a block."""
    style = next((style for pattern, style in patterns if pattern.fullmatch(path)), None)
    known = ("colwise", "rowwise", _HALVES.get(path.rpartition(".")[2]))
    return None if isinstance(style, str) and style not in known else style


def _cut(layer: Any, style: Any) -> tuple[int, tuple[int, ...]]:
    from diffusers.hooks.tensor_parallel import PackedRowwiseParallel

    dim = int(style in ("rowwise", _HALVES["down_proj"]) or isinstance(style, PackedRowwiseParallel))
    length = layer.weight.shape[dim]
    declared: Any = getattr(layer, "_tp_packed_row_blocks" if dim else "_tp_packed_col_blocks", None)
    if isinstance(style, str):
        shares = [1, 1] if style == _HALVES["gate_up_proj"] else [1]
    else:
        shares = list(style.blocks or declared)
    return dim, tuple(length * share // sum(shares) for share in shares)


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One line of a class's plan for splitting its sequence. item: None where the output is gathered."""

    module: str
    item: str | int | None
    dim: int
    num_dims: int | None


def context_parallel_plan(model: Any) -> list[PlanEntry] | None:
    """How a model's class would have its sequence split and gathered; None if it does not say."""
    plan = getattr(type(model), "_cp_plan", None)
    if plan is None:
        return None
    return [entry for module, what in plan.items() for entry in _plan_entries(module, what)]


def _plan_entries(module: str, what: Any) -> list[PlanEntry]:
    if not isinstance(what, dict):
        gathers = what if isinstance(what, list | tuple) else [what]
        return [PlanEntry(module=module, item=None, dim=g.gather_dim, num_dims=g.expected_dims) for g in gathers]
    splits = [(item, s) for item, one in what.items() for s in (one if isinstance(one, list | tuple) else [one])]
    return [PlanEntry(module=module, item=item, dim=s.split_dim, num_dims=s.expected_dims) for item, s in splits]


def converted_lora(pipeline: Any, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """An adapter's tensors under names of the pipeline's components and layers, by the loader of its class.

    What loaders give differs by class: tensors alone, or with the strengths of layers beside them.
    None: the class has no loader. Raises whatever names that it does not know make it raise.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    load = getattr(type(pipeline), "lora_state_dict", None)
    if load is None:
        return None
    takes = inspect.signature(load).parameters
    more = {"return_alphas": True} if "return_alphas" in takes else {}
    unet = components(pipeline).get("unet")
    given = load(dict(tensors), **more, **({"unet_config": unet.config} if unet is not None else {}))
    found, strengths = given[:2] if isinstance(given, tuple) else (given, None)
    named: dict[str, Any] = convert_unet_state_dict_to_peft(found)
    return named | {_strength_key(name): value for name, value in (strengths or {}).items()}


def _strength_key(name: str) -> str:
    return name if name.endswith(".alpha") else f"{name}.alpha"
