"""Videos: frames to MP4 or WebM by ffmpeg, which comes as a wheel, or to an animated GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
# H.264 and VP9 store colour at half resolution; ffmpeg scales odd sizes up to the next even one.
_EVEN = 2


def write(frames: Sequence[Any], path: Path, *, fps: float, sound: Path | None = None) -> None:
    """Frames as PIL images, or arrays [height, width, 3] of bytes or of floats in 0 to 1.

    Args:
        sound: a WAV file to put beside the frames; a GIF has none.
    """
    if path.suffix.lower() == ".gif":
        _write_gif(frames, path, fps)
    else:
        _write_encoded(frames, path, fps, sound)


def _write_gif(frames: Sequence[Any], path: Path, fps: float) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(_pixels(frame)) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def _write_encoded(frames: Sequence[Any], path: Path, fps: float, sound: Path | None) -> None:
    import imageio_ffmpeg

    height, width = _pixels(frames[0]).shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec=CODECS[path.suffix.lower()],
        quality=8,
        macro_block_size=_EVEN,
        ffmpeg_log_level="error",
        audio_path=str(sound) if sound else None,
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(_pixels(frame).tobytes())
    finally:
        writer.close()


def _pixels(frame: Any) -> Any:
    """A frame as bytes [height, width, 3]."""
    import numpy as np

    pixels = np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
    if pixels.dtype.kind == "f":
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(pixels[..., :3])
