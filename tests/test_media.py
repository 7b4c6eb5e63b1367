"""Files that outputs become: readable by others, whole or not there, with the sound in the video."""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from denoised.errors import InvalidRequestError
from denoised.media import files
from denoised.media.save import save
from denoised.outputs import OmniRequestOutput

FRAMES = [Image.new("RGB", (64, 48), (20 * i, 0, 255 - 20 * i)) for i in range(9)]
TONE = torch.sin(torch.arange(22_050) / 10).repeat(2, 1)


def _output(**media: Any) -> OmniRequestOutput:
    return OmniRequestOutput(request_id="r", prompt={"prompt": "p"}, **media)


def _streams(path: Path) -> str:
    """What ffmpeg says of a file."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True)
    return done.stderr


@pytest.mark.parametrize(
    ("name", "form"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")]
)
def test_images(name: str, form: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    [path] = save(_output(images=[picture]), tmp_path / name)
    with Image.open(path) as image:
        assert (image.format, image.size) == (form, (32, 16))
        assert np.abs(np.asarray(image.convert("RGB"), int) - (255, 0, 0)).max() < 8


def test_several_and_layers_are_numbered(tmp_path: Path) -> None:
    layers = [[FRAMES[0], FRAMES[1]], [FRAMES[2]]]
    paths = save(_output(images=layers), tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", "a_1.png", "a_2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a_1.png", "a_2.png"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("arrays", [False, True])
def test_videos(suffix: str, arrays: bool, tmp_path: Path) -> None:
    frames = [np.asarray(frame) / 255 for frame in FRAMES] if arrays else FRAMES
    [path] = save(_output(videos=[frames]), tmp_path / f"a{suffix}", fps=12)
    said = _streams(path)
    assert "64x48" in said
    assert "12 fps" in said
    assert "Audio" not in said
    count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert count == len(FRAMES)


def test_video_with_sound(tmp_path: Path) -> None:
    [path] = save(_output(videos=[FRAMES], audios=[TONE]), tmp_path / "a.mp4", fps=18, sample_rate=22_050)
    assert "Audio: aac" in _streams(path)
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]


def test_gif(tmp_path: Path) -> None:
    [path] = save(_output(videos=[FRAMES]), tmp_path / "a.gif", fps=10)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["duration"]) == (len(FRAMES), 100)


@pytest.mark.parametrize(
    "samples", [TONE, TONE.numpy(), TONE[0], TONE.bfloat16() * 3], ids=["two", "numpy", "one", "loud"]
)
def test_sound(samples: Any, tmp_path: Path) -> None:
    [path] = save(_output(audios=[samples]), tmp_path / "a.wav", sample_rate=22_050)
    with wave.open(str(path)) as file:
        assert file.getframerate() == 22_050
        assert file.getnchannels() == (1 if samples.ndim == 1 else 2)
        assert file.getnframes() == TONE.shape[-1]
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert 32_000 < np.abs(pcm.astype(int)).max() <= 32_767


def _interrupted(path: Path, error: BaseException) -> None:
    with files.replacing(path) as aside:
        aside.write_text("half")
        raise error


def test_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(path, KeyboardInterrupt())
    with pytest.raises(InvalidRequestError, match=r"a\.png' cannot be written \(No space left\); choose"):
        _interrupted(path, OSError(28, "No space left"))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    [path] = save(_output(images=[FRAMES[0]]), tmp_path / "a.png")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
