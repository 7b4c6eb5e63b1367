"""GGUF files: which one a component's weights are in, and its tensors, unread, under the names that the model has.

The format holds weights alone, so that a component's configuration comes from its folder in diffusers layout. Names
are diffusers' own, or those of the model's authors, for which diffusers has a converter by class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoised import hf
from denoised.errors import ModelError, one_line
from denoised.features.quantize import Packed, blocks
from denoised.runtime.unread import Unread

_log = logging.getLogger(__name__)
_SHOWN = 8  # names in an error


def model(source: str | Path, component: str, class_name: str, file: Path, dtype: torch.dtype, device: str) -> Any:
    """A component of diffusers whose weights are `Unread` and come from this file.

    Raises:
        ModelError: the class is none of diffusers', or the file is damaged, or of another model.
    """
    made = hf.empty_model(class_name, source, component)
    if made is None:
        raise ModelError(
            f"{file} cannot be the weights of {component}: {class_name} is no model of diffusers; name a denoiser."
        )
    _fill(made, _named(made, file, _tensors(file, device)), file, dtype)
    return made.eval()


def _tensors(file: Path, device: str) -> dict[str, Tensor]:
    """All tensors of the file, mapped and not read."""
    import gguf

    try:
        entries = gguf.GGUFReader(file, "c").tensors  # copy on write: torch wants memory that it could write to
    except Exception as error:  # whatever bytes can do to a parser
        raise ModelError(f"{file} is no readable GGUF file ({one_line(error)}); download it again.") from error
    return {entry.name: _unread(entry, file, torch.device(device)) for entry in entries}


def _unread(entry: Any, file: Path, device: torch.device) -> Unread:
    kind = int(entry.tensor_type)
    if not blocks.is_known(kind):
        raise ModelError(f"{file}: {entry.name} is of kind {entry.tensor_type.name}, which diffusers cannot read.")
    found = _stored(entry.data, kind)
    likeness = torch.empty(found.shape, dtype=found.dtype, device="meta")
    return Unread(likeness, device, stored=functools.partial(_stored, entry.data, kind))


def _stored(data: Any, kind: int) -> Tensor:
    found = torch.from_numpy(data)
    if found.dtype != torch.uint8:
        return found
    plain = blocks.plain_dtype(kind)
    return Packed(found, kind, torch.float32) if plain is None else found.view(plain)


def _named(made: nn.Module, file: Path, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    try:
        return hf.converted_single_file(made, tensors)
    except Exception as error:  # converters take names for granted
        raise ModelError(
            f"{file} has names that {type(made).__name__} of diffusers does not know ({one_line(error)}); is it a "
            "file of another model?"
        ) from error


def _fill(made: nn.Module, named: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    wanted = made.state_dict(keep_vars=True)
    missing = [name for name, tensor in wanted.items() if name not in named and tensor.is_meta]
    if missing:
        raise ModelError(
            f"{file} lacks the weight {missing[0]} of {type(made).__name__} ({len(missing)} in all); is it a file of "
            "another model?"
        )
    _check_others(made, sorted(named.keys() - wanted.keys()), file)
    kept = hf.kept_in_float32(made) if dtype == torch.float16 else frozenset[str]()
    for name in wanted.keys() & named.keys():
        exact = torch.float32 if kept & set(name.split(".")) else dtype
        _put(made, name, _shaped(named[name], wanted[name].shape, f"{file}: {name}").to(exact))


def _check_others(made: nn.Module, more: list[str], file: Path) -> None:
    """Tensors that the model does not have. Some files have scraps beside; parts of blocks are of a larger model."""
    if not more:
        return
    name = type(made).__name__
    _log.warning("%s holds %d tensors that %s does not have: %s", file, len(more), name, ", ".join(more))
    lists = tuple(f"{path}." for path, part in made.named_modules() if isinstance(part, nn.ModuleList))
    blocks_of = [found for found in more if found.startswith(lists)]
    if blocks_of:
        rest = f" and {len(blocks_of) - _SHOWN} more (the log has all)" if len(blocks_of) > _SHOWN else ""
        raise ModelError(
            f"{file} holds parts of blocks that {name} does not have: {', '.join(blocks_of[:_SHOWN])}{rest}; is it a "
            "file of a larger model?"
        )


def _shaped(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The format has no more than four dimensions, and files have fewer where one is 1."""
    if tensor.shape == shape:
        return tensor
    if tensor.numel() != shape.numel():
        raise ModelError(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}; is it of another model?")
    return tensor.view(shape)


def _put(made: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = made.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
