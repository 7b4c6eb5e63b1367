"""Input pictures for pipelines that edit or animate one."""

import numpy as np
from PIL import Image


def picture(width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Coarse coloured noise: it stays itself when a pipeline resizes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(coarse, mode).resize((width, height))
