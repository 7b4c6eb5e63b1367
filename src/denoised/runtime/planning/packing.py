"""What quantization takes off a model's weights: of which layers, how many bytes, and which ranks share the rest.

Layers are those that the feature itself would take; sizes are what it makes of matrices without memory. Of a GGUF file
the list of its tensors is read, and of a component that comes quantized its configuration, or what was loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError, one_line
from denoised.features import quantize, tensor
from denoised.features.quantize import Size
from denoised.runtime import gguf_choice, gguf_files, quantizing
from denoised.runtime.came_quantized import again_problem
from denoised.runtime.planning.facts import Component, Denoiser, Limits, ModelFacts, Work
from denoised.runtime.planning.skeleton import CAME, folder_of
from denoised.runtime.planning.work import mixture_of
from denoised.runtime.unread import Unread
from denoised.spec.blocks import stacks
from denoised.spec.model_spec import ModelSpec
from denoised.spec.tensor import Layer


def packed(facts: ModelFacts, pipeline: Any, spec: ModelSpec, config: EngineConfig) -> ModelFacts:
    """The same facts, with weights as they are stored.

    Raises:
        InvalidConfigError: the engine would refuse these settings for this model.
        ModelError: a component comes quantized in a way that only loading it would tell the bytes of.
    """
    parts = {name: part for name, part in hf.components(pipeline).items() if isinstance(part, nn.Module)}
    methods = quantizing.asked(pipeline, spec, config)
    came = {name: sizes for name, part in parts.items() if (sizes := _came(name, part, facts))}
    _check(methods, came, facts)
    holders = parts | _in_files(parts, config, facts)
    sized = came | {name: _asked(name, holders[name], method, spec, facts) for name, method in methods.items()}
    found = tuple(_denoiser(one, parts[one.name], spec, sized.get(one.name, {}), facts) for one in facts.denoisers)
    components = tuple(_component(part, parts[part.name], sized, came, facts) for part in facts.components)
    return replace(facts, denoisers=found, components=components, methods=tuple(methods.items()))


def _check(methods: dict[str, str], came: dict[str, dict[str, Size]], facts: ModelFacts) -> None:
    for name, method in methods.items():
        if name in came:
            raise InvalidConfigError(again_problem(name, f"{len(came[name])} layers"))
        quantize.check_dtype(method, torch.device(facts.device), dtype_of(facts))


def dtype_of(facts: ModelFacts) -> torch.dtype:
    """Of weights that are not quantized."""
    found: torch.dtype = getattr(torch, facts.dtype)
    return found


def _asked(name: str, part: nn.Module, method: str, spec: ModelSpec, facts: ModelFacts) -> dict[str, Size]:
    patterns = spec.unquantized if name in spec.denoisers else ()
    device = torch.device(facts.device)
    return quantize.sizes(part, method, component=name, patterns=patterns, device=device, stored=_stored)


def _in_files(parts: Mapping[str, nn.Module], config: EngineConfig, facts: ModelFacts) -> dict[str, nn.Module]:
    """Components without weights, as their GGUF files have them."""
    files = gguf_choice.files(config)
    bare = [name for name in files if name in parts and all(p.is_meta for p in parts[name].parameters())]
    return {name: _in_file(parts[name], name, files[name], config, facts) for name in bare}


def _in_file(part: nn.Module, name: str, file: Path, config: EngineConfig, facts: ModelFacts) -> nn.Module:
    folder, dtype = folder_of(str(config.model)), dtype_of(facts)
    found: nn.Module = gguf_files.model(folder, name, type(part).__name__, file, dtype, "cpu")
    return found


def _stored(weight: Tensor) -> Tensor:
    return weight.stored() if isinstance(weight, Unread) else weight


def _came(name: str, part: nn.Module, facts: ModelFacts) -> dict[str, Size]:
    """Of weights that come quantized, by the path of their layer; they are there, or told by a configuration."""
    config = vars(part).get(CAME)
    return quantize.existing_sizes(part) if config is None else _by_configuration(name, part, config, facts)


def _by_configuration(name: str, part: nn.Module, config: dict[str, Any], facts: ModelFacts) -> dict[str, Size]:
    try:
        found = hf.quantized_by(part, config)
        size = None if found is None else quantize.sizes_of_library(found.settings, dtype_of(facts))
    except Exception as error:  # whatever torchao cannot do on this machine
        raise ModelError(f"{name} comes quantized, and its bytes cannot be told here: {one_line(error)}") from error
    if found is None or size is None:
        raise ModelError(
            f"{name} comes quantized by {config.get('quant_method')!r}, whose bytes are not known before it is "
            "loaded; plan for the model that is not quantized."
        )
    paths = (weight.rpartition(".")[0] for weight in found.names)
    return {path: size(part.get_submodule(path).get_parameter("weight").shape) for path in paths}


def _component(
    part: Component, module: nn.Module, sized: dict[str, dict[str, Size]], came: Iterable[str], facts: ModelFacts
) -> Component:
    sizes = sized.get(part.name, {})
    saved = sum(_numel(module, path) * facts.itemsize - size.codes - size.scales for path, size in sizes.items())
    return replace(part, saved=saved, came=part.name in came)


def _numel(module: nn.Module, path: str) -> int:
    return module.get_submodule(path).get_parameter("weight").numel()


def _denoiser(
    found: Denoiser, model: nn.Module, spec: ModelSpec, sizes: dict[str, Size], facts: ModelFacts
) -> Denoiser:
    """What each block saves is among its own work, and what all other layers save among the rest."""
    cuts = tensor.cuts(model, spec) if sizes else {}
    layers = {path: model.get_submodule(path) for path in sizes}
    saved = {id(layers[path]): _saved(layers[path], sizes[path], cuts.get(path), facts.itemsize) for path in sizes}
    blocks = [block for stack in stacks(model, spec.stacks) for block in stack.blocks]
    stored = tuple(_plain(work) + _within(block, saved) for work, block in zip(found.blocks, blocks, strict=True))
    rest = sum(saved.values(), _plain(found.rest))  # what no block has taken out
    return replace(found, blocks=stored, rest=rest, limits=_limits(found.limits, cuts, sizes))


def _plain(work: Work) -> Work:
    return replace(work, cut_saved=0.0, whole_saved=0.0, expert_saved=0.0)


def _within(block: nn.Module, saved: dict[int, Work]) -> Work:
    """What a block's layers save, taken out of `saved`."""
    total = Work()
    for path, layer in block.named_modules():
        own = saved.pop(id(layer), Work())
        total += own if mixture_of(path) is None else replace(own, expert_saved=own.cut_saved)
    return total


def _saved(layer: nn.Module, size: Size, cut: Layer | None, itemsize: int) -> Work:
    """Of one layer. Codes are divided with its values, and scales where its outputs are."""
    codes = layer.get_parameter("weight").numel() * itemsize - size.codes
    if cut is None:
        return Work(whole_saved=codes - size.scales)
    if cut.dim == 0:
        return Work(cut_saved=codes - size.scales)
    return Work(cut_saved=codes, whole_saved=-size.scales)


def _limits(limits: Limits, cuts: Mapping[str, Layer], sizes: dict[str, Size]) -> Limits:
    """Without degrees that would cut inside of a file's blocks."""
    pieces = [(cuts[path].sizes, size.columns) for path, size in sizes.items() if path in cuts and cuts[path].dim == 1]

    def whole(degree: int) -> bool:
        return all(length // degree % columns == 0 for lengths, columns in pieces for length in lengths)

    kept, beside = (tuple(filter(whole, degrees)) for degrees in (limits.tensor, limits.tensor_beside_experts))
    return replace(limits, tensor=kept, tensor_beside_experts=beside)
