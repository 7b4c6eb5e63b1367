"""Finding modules of a denoiser by path, and changing one tensor of what they take or give. Knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that leave the computation to a processor: the library's form of attention."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "processor"))


def find(module: nn.Module, atoms: list[str]) -> list[nn.Module]:
    """The modules at a path whose atoms are names, `*`, `-1` or `:-1`."""
    if not atoms:
        return [module]
    children = list(module.named_children())
    several = {"*": children, "-1": children[-1:], ":-1": children[:-1]}
    chosen = several.get(atoms[0], [child for child in children if child[0] == atoms[0]])
    return [found for _, child in chosen for found in find(child, atoms[1:])]


def argument(names: list[str], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward with these parameters was called with; None if it was left out."""
    if name in kwargs or name not in names:
        return kwargs.get(name)
    index = names.index(name)
    return args[index] if index < len(args) else None


def replaced(output: Any, item: int, edit: Callable[[Any], Any]) -> Any:
    """An output with one of its tensors changed."""
    if not isinstance(output, list | tuple):
        return edit(output)
    return type(output)(edit(part) if index == item else part for index, part in enumerate(output))
