"""Sound as 16-bit WAV, with the standard library."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any


def write(samples: Any, path: Path, *, sample_rate: int) -> None:
    """Samples in -1 to 1, [channels, samples] or [samples], as a tensor or an array."""
    import numpy as np

    if hasattr(samples, "detach"):
        samples = samples.detach().float().cpu().numpy()
    channels = np.atleast_2d(np.asarray(samples, dtype=np.float32))
    pcm = (np.clip(channels, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(pcm))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.T.tobytes())
