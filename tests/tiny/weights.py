"""Random weights that keep the signal alive: what goes in makes a visible difference to what comes out."""

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def randomize(module: ModuleT, seed: int, gain: float = 1.0) -> ModuleT:
    """Overwrite every parameter, the same way in every process, and switch dropout off.

    The libraries' own initial values would not do: they are made to train from, so gates and last layers start
    at zero, and text encoders so flat that two prompts look alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rpartition(".")[2]
            if leaf == "bias":
                parameter.copy_(0.1 * noise)
            elif leaf == "weight_g":  # weight norm: the length of the direction in `weight_v`
                parameter.copy_(gain * (1 + 0.1 * noise))
            elif parameter.ndim <= 1 or leaf == "gamma":  # scales of norms; those of the video VAEs are 4-D
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
    return module.eval()
