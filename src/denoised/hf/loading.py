"""What loaders do behind their arguments: messages, files that are opened, components that are given, names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


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
