"""Random adapters for tiny checkpoints, in the layouts in which people find them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

# Of what is added, next to what a layer gives: enough to see, too little to drive a model out of its range.
STRENGTH = 0.5

Pair = tuple[Tensor, Tensor]


def pairs(
    model: nn.Module, *, seed: int, rank: int = 2, only: Callable[[str], bool] = lambda path: True
) -> dict[str, Pair]:
    """(rank, in) and (out, rank) for each Linear of a model by its path; every third layer has one rank more."""
    linears = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear) and only(path)]
    generator = torch.Generator().manual_seed(seed)
    return {
        path: _pair(layer.in_features, layer.out_features, rank + (number % 3 == 0), generator)
        for number, (path, layer) in enumerate(linears)
    }


def _pair(inputs: int, outputs: int, rank: int, generator: torch.Generator) -> Pair:
    down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    up = torch.randn(outputs, rank, generator=generator) / rank**0.5
    return down, up * STRENGTH


def in_diffusers(found: dict[str, Pair], component: str = "transformer") -> dict[str, Tensor]:
    """As diffusers saves them."""
    named = {f"{component}.{path}.lora_A.weight": down for path, (down, _) in found.items()}
    return named | {f"{component}.{path}.lora_B.weight": up for path, (_, up) in found.items()}


def in_kohya(found: dict[str, Pair], *, alpha: float, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """As sd-scripts saves them, of a model that has these names."""
    named: dict[str, Tensor] = {}
    for path, (down, up) in found.items():
        layer = prefix + path.replace(".", "_")
        named |= {
            f"{layer}.lora_down.weight": down,
            f"{layer}.lora_up.weight": up,
            f"{layer}.alpha": torch.tensor(alpha),
        }
    return named


def write(file: Path, tensors: dict[str, Tensor]) -> str:
    """A file of tensors; its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, file
    )
    return str(file)


def write_peft(folder: Path, found: dict[str, Pair], **settings: Any) -> str:
    """A folder as PEFT's save_pretrained makes it; its path."""
    prefix = "base_model.model."
    named = {f"{prefix}{path}.lora_A.weight": down for path, (down, _) in found.items()}
    named |= {f"{prefix}{path}.lora_B.weight": up for path, (_, up) in found.items()}
    write(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | settings))
    return str(folder)


def fuse(model: nn.Module, found: dict[str, Pair], scale: float) -> None:
    """Add adapters to the weights themselves: what the sum beside the layers must equal."""
    with torch.no_grad():
        for path, (down, up) in found.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            layer.weight += scale * (up @ down).to(layer.weight.dtype)
