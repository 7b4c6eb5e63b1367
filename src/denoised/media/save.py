"""The output of a request as files, each written whole or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from denoised.media import audio, images, video
from denoised.media.files import numbered, replacing
from denoised.outputs import OmniRequestOutput

DEFAULT_FPS = 24.0
DEFAULT_SAMPLE_RATE = 44_100


def save(
    output: OmniRequestOutput, path: Path, *, fps: float | None = None, sample_rate: int | None = None
) -> list[Path]:
    """Write every image, video or sound of `output`; gives the paths: output, output_1, ...

    Args:
        fps: frames a second of videos.
        sample_rate: samples a second of sound.

    Raises:
        InvalidRequestError: a file could not be written.
    """
    rate = sample_rate or DEFAULT_SAMPLE_RATE
    if output.videos:
        return _save_videos(output, path, fps or DEFAULT_FPS, rate)
    media = list(_flat(output.images)) or output.audios
    paths = numbered(path, len(media))
    for item, target in zip(media, paths, strict=True):
        with replacing(target) as aside:
            if output.images:
                images.write(item, aside)
            else:
                audio.write(item, aside, sample_rate=rate)
    return paths


def _save_videos(output: OmniRequestOutput, path: Path, fps: float, rate: int) -> list[Path]:
    paths = numbered(path, len(output.videos))
    sounds = output.audios or [None] * len(paths)
    for frames, sound, target in zip(output.videos, sounds, paths, strict=True):
        with replacing(target) as aside, _as_wav(sound, rate) as wav:
            video.write(frames, aside, fps=fps, sound=wav)
    return paths


@contextlib.contextmanager
def _as_wav(sound: Any, rate: int) -> Iterator[Path | None]:
    if sound is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="denoised-sound-") as folder:
        path = Path(folder) / "sound.wav"
        audio.write(sound, path, sample_rate=rate)
        yield path


def _flat(items: Sequence[Any]) -> Iterator[Any]:
    """Layered models give a list of layers for each image."""
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            yield item
