"""How alike two pictures are: SSIM and PSNR, by their definitions.

SSIM is that of Wang et al., 2004 (IEEE TIP 13(4)): a Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), the
mean over all places that the window fits in, and over red, green and blue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from denoised.errors import InvalidRequestError
from denoised.outputs import OmniRequestOutput

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def pictures(output: OmniRequestOutput) -> Tensor:
    """The images or frames of an output, [pictures, channels, height, width] in 0..1.

    Raises:
        InvalidRequestError: it failed, or holds none.
    """
    if output.error is not None:
        raise InvalidRequestError(output.error)
    found = [*output.images, *(frame for video in output.videos for frame in video)]
    if not found or isinstance(found[0], str):
        raise InvalidRequestError(
            "quality is measured on pictures, and this model makes none; calibrate it with --no-measure."
        )
    return torch.stack([_tensor(picture) for picture in found])


def _tensor(picture: Any) -> Tensor:
    """[channels, height, width] of a PIL image, or of an array [height, width, channels] in 0..1."""
    array = np.array(picture)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    found = torch.from_numpy(array.astype(np.float64) / scale)
    return found.permute(2, 0, 1) if found.dim() == 3 else found[None]


def ssim(ours: Tensor, theirs: Tensor) -> list[float]:
    """Of each pair of pictures [pictures, channels, height, width] in 0..1; 1 for equal ones."""
    channels = ours.shape[1]
    window = _window(min(WINDOW, *ours.shape[2:])).expand(channels, 1, -1, -1)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=channels)

    a, b = ours.double(), theirs.double()
    at, bt = mean(a), mean(b)
    va, vb, both = mean(a * a) - at**2, mean(b * b) - bt**2, mean(a * b) - at * bt
    found = (2 * at * bt + C1) * (2 * both + C2) / ((at**2 + bt**2 + C1) * (va + vb + C2))
    return [float(value) for value in found.mean(dim=(1, 2, 3))]


def _window(size: int) -> Tensor:
    """[1, 1, size, size], summing up to 1."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-(x**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    return (weights[:, None] * weights[None, :])[None, None]


def psnr(ours: Tensor, theirs: Tensor) -> list[float]:
    """Decibels of each pair of pictures in 0..1; infinite for equal ones."""
    errors = ((ours.double() - theirs.double()) ** 2).mean(dim=(1, 2, 3)).tolist()
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def mean(values: Sequence[float]) -> float:
    """Of at least one number."""
    return sum(values) / len(values)
