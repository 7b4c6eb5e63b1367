"""The only file that names private symbols of diffusers and transformers, or leans on undocumented behaviour.

`tests/test_hf.py` asserts that each exists, so that an upgrade fails there and not in a picture.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


def components(pipeline: Any) -> dict[str, Any]:
    """Name to component of a pipeline, without those that are not loaded.

    `pipeline.components` leaves out what a constructor has a default for, even if it is there.
    """
    known = pipeline.components
    others = {name: vars(pipeline).get(name) for name in vars(pipeline).get("_internal_dict", ()) if name not in known}
    found = {**known, **{name: part for name, part in others.items() if _is_component(part)}}
    return {name: part for name, part in found.items() if part is not None}


def _is_component(part: Any) -> bool:
    from diffusers import SchedulerMixin
    from torch import nn

    return isinstance(part, nn.Module | SchedulerMixin)


def stateful_components(pipeline: Any) -> dict[str, Any]:
    """Components that carry state across the steps of one call: schedulers and guiders, not modules or tokenizers."""
    return {name: part for name, part in components(pipeline).items() if _is_stateful(part)}


def _is_stateful(component: Any) -> bool:
    from diffusers import SchedulerMixin
    from diffusers.guiders.guider_utils import BaseGuidance
    from torch import nn

    return not isinstance(component, nn.Module) and isinstance(component, SchedulerMixin | BaseGuidance)


# What pipelines call to change how a module attends, for all who share it.
_CHANGES = frozenset(
    "set_attn_processor _set_pag_attn_processor register_attention_control enable_fuser _set_ar_attention".split()
)


def changes_modules(pipeline: Any) -> bool:
    """Whether a pipeline's call changes modules that other requests use meanwhile. Told from the names in it."""
    call = inspect.unwrap(type(pipeline).__call__)
    return not _CHANGES.isdisjoint(call.__code__.co_names)


@contextlib.contextmanager
def same_processors(pipeline: Any) -> Iterator[None]:
    """However the block ends, modules attend as they did before it: a cancelled call does not tidy up."""
    parts = [part for part in components(pipeline).values() if hasattr(part, "set_attn_processor")]
    before = [dict(part.attn_processors) for part in parts]
    try:
        yield
    finally:
        for part, processors in zip(parts, before, strict=True):
            part.set_attn_processor(processors)


def inner_pipelines(pipeline: Any) -> dict[str, Any]:
    """Pipelines that a pipeline is made of and calls in turn, by attribute."""
    from diffusers import DiffusionPipeline

    return {name: value for name, value in vars(pipeline).items() if isinstance(value, DiffusionPipeline)}


def execution_device(pipeline: Any) -> Any:
    """The device a pipeline draws its noise on and moves its inputs to."""
    return pipeline._execution_device


def set_config(pipeline: Any, **values: Any) -> None:
    """Change entries of a pipeline's configuration on this object only (a request's copy)."""
    pipeline.register_to_config(**values)


@contextlib.contextmanager
def quietly(*, bars: bool) -> Iterator[None]:
    """No advice from the libraries while a model loads; `bars` keeps their progress bars, for downloads."""
    import diffusers
    import transformers

    loggings = [diffusers.utils.logging, transformers.utils.logging]
    levels = [library.get_verbosity() for library in loggings]
    for library in loggings:
        library.set_verbosity_error()
        if not bars:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(loggings, levels, strict=True):
            library.set_verbosity(level)
            if not bars:
                library.enable_progress_bar()


@contextlib.contextmanager
def opening_weights(*, load_file: Callable[..., Any], safe_open: Callable[..., Any]) -> Iterator[None]:
    """Let diffusers and transformers open safetensors files with these, in place of the functions of the same name."""
    import safetensors.torch
    import transformers.modeling_utils

    places = [(safetensors.torch, "load_file", load_file), (transformers.modeling_utils, "safe_open", safe_open)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


class _Taken(logging.Filter):
    """Keeps a record from being printed if somebody takes its message."""

    def __init__(self, take: Callable[[str], bool]) -> None:
        super().__init__()
        self._take = take

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not self._take(record.getMessage())


def route_warnings(take: Callable[[str], bool]) -> None:
    """Offer the libraries' warnings to `take`; those that it returns True for are not printed."""
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(f, _Taken) for f in handler.filters):
                handler.addFilter(_Taken(take))


def output_class(name: str) -> type | None:
    """The output class of diffusers with this full name, if it is imported by now."""
    from diffusers.utils import BaseOutput

    return next((c for c in subclasses(BaseOutput) if f"{c.__module__}.{c.__qualname__}" == name), None)


def subclasses(cls: type) -> list[type]:
    """All classes below `cls` that are imported by now."""
    children: list[type] = cls.__subclasses__()
    return children + [below for child in children for below in subclasses(child)]


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
    return None if isinstance(style, str) and style not in ("colwise", "rowwise") else style


def _cut(layer: Any, style: Any) -> tuple[int, tuple[int, ...]]:
    from diffusers.hooks.tensor_parallel import PackedRowwiseParallel

    dim = int(style == "rowwise" or isinstance(style, PackedRowwiseParallel))
    length = layer.weight.shape[dim]
    declared: Any = getattr(layer, "_tp_packed_row_blocks" if dim else "_tp_packed_col_blocks", None)
    shares = [1] if isinstance(style, str) else list(style.blocks or declared)
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


# ---- quantization

# diffusers imports torchao where it is installed; what that says of kernels which this machine has no use for.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def holds_parts(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file says that its tensors are parts of quantized ones, as torchao writes them."""
    return bool(metadata) and "tensor_names" in (metadata or {})


def is_quantized(model: Any) -> bool:
    """Whether a component came quantized, by its own configuration."""
    return getattr(model, "hf_quantizer", None) is not None


def class_names(source: Any) -> dict[str, str]:
    """Component to class of a pipeline in a folder or on the hub, from its index alone."""
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(source)
    pairs = {name: value for name, value in index.items() if isinstance(value, list | tuple) and len(value) == 2}
    return {name: value[1] for name, value in pairs.items() if isinstance(value[1], str)}


def empty_model(class_name: str, source: Any, component: str) -> Any:
    """A model of diffusers as its configuration says, without memory for weights; None: the class is none of them."""
    import diffusers
    from accelerate import init_empty_weights

    cls: Any = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        return None
    found: Any = cls
    config = found.load_config(source, subfolder=component)
    with init_empty_weights():
        return found.from_config(config)


@contextlib.contextmanager
def giving_components(given: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a pipeline that is loaded takes these components, and reads nothing of them.

    As keywords of `from_pretrained` they would do, but for those that a class may be without.
    """
    import diffusers.pipelines.pipeline_utils as place

    load = place.load_sub_model
    place.load_sub_model = lambda *args, **kwargs: given.get(kwargs["name"]) or load(*args, **kwargs)
    try:
        yield
    finally:
        place.load_sub_model = load


def converted_single_file(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file of the model's authors under diffusers' names; those that have these stay as they are.

    Raises whatever names that it does not know make the converter raise.
    """
    from diffusers.loaders.single_file_model import (
        SINGLE_FILE_LOADABLE_CLASSES,
        _get_single_file_loadable_mapping_class,
    )

    found = dict(tensors)
    name = _get_single_file_loadable_mapping_class(type(model))
    if name is None or model.state_dict().keys() <= found.keys():
        return found
    convert = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    named: dict[str, Any] = convert(config=dict(model.config), checkpoint=found)
    return named


def kept_in_float32(model: Any) -> frozenset[str]:
    """Parts of the paths of weights that stay in float32 in a model of float16."""
    return frozenset(model._keep_in_fp32_modules or ())
