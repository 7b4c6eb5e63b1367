"""The `curl` lines of docs/server.md, as written but for the address, the job's id, and what a tiny model can make.

Those in ```bash blocks, for the built-in model, are run by test_docs.py, those of drafts by test_drafts.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.contract.support import folder
from tests.server.live import Live, live
from tests.server.test_edits import png
from tests.server.test_media import video
from tests.tiny.pictures import picture as drawn

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
LINES = [one for one in re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE) if "/drafts" not in one]
VIDEO = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0, "fps": 8}
EDIT = {"height": 32, "width": 32, "num_inference_steps": 2}
# What the page asks for, and what the tiny models can make of it in no time.
SMALLER = {"size=832x480": "size=48x32", "seconds=4": "seconds=1", '"audio_length": 10': '"audio_length": 4'}


def line(*words: str) -> str:
    """The one on the page that has all these words."""
    [found] = [one for one in LINES if all(re.search(rf"{word}(\s|$)", one) for word in words)]
    return found


def run(server: Live, command: str, place: Path, video_id: str = "") -> str:
    for word, smaller in SMALLER.items():
        command = command.replace(word, smaller)
    command = command.replace("http://127.0.0.1:8091", server.url).replace("video_0123", video_id)
    shell = ["bash", "-c", f"{command} -sS --fail-with-body"]
    done = subprocess.run(shell, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "cat.png").write_bytes(png(drawn(64, 64, seed=1)))
    (tmp_path / "boat.png").write_bytes(png(drawn(48, 32, seed=2)))
    return tmp_path


@pytest.fixture(scope="module")
def editor() -> Iterator[Live]:
    plugins = ("tests.contract.rank_setup",)  # which keeps what the picture is scaled to small
    with live(folder("qwen_image_edit_plus"), default_sampling_params=EDIT, plugins=plugins) as made:
        yield made


@pytest.fixture(scope="module")
def animator() -> Iterator[Live]:
    with live(folder("wan22_i2v"), default_sampling_params=VIDEO) as made:
        yield made


def test_every_line_is_run_here() -> None:
    assert len(LINES) == 8


def test_edit(editor: Live, place: Path) -> None:
    answer = json.loads(run(editor, line("image=@cat.png"), place))
    assert (len(answer["data"]), answer["receipt"]["seed"], answer["receipt"]["steps"]) == (1, 7, 2)


def test_a_video_from_its_creation_to_its_end(animator: Live, place: Path) -> None:
    job = json.loads(run(animator, line("input_reference=@boat.png"), place))
    events = run(animator, line("/v1/videos/video_0123/events"), place, job["id"])
    assert events.startswith("event: video.progress\n")
    assert events.split("event: ")[-1].startswith("video.completed\n")
    shown = json.loads(run(animator, line("curl http://127.0.0.1:8091/v1/videos/video_0123"), place, job["id"]))
    assert (shown["status"], shown["size"], shown["seconds"]) == ("completed", "48x32", "1.125")
    run(animator, line("/v1/videos/video_0123/content"), place, job["id"])
    assert video((place / "boat.mp4").read_bytes()) == (9, [48, 32], 8)
    assert json.loads(run(animator, line("DELETE"), place, job["id"]))["deleted"] is True


@pytest.mark.slow
def test_a_video_at_once(place: Path) -> None:
    with live(folder("wan22_t2v"), default_sampling_params=VIDEO) as server:
        run(server, line("http://127.0.0.1:8091/v1/videos/sync"), place)
    assert video((place / "boat.mp4").read_bytes()) == (9, [48, 32], 8)


@pytest.mark.slow
def test_sound(place: Path) -> None:
    with live(folder("stable_audio"), default_sampling_params={"num_inference_steps": 3}) as server:
        run(server, line("http://127.0.0.1:8091/v1/audio/generate"), place)
    with wave.open(str(place / "rain.wav")) as file:
        assert file.getnframes() / file.getframerate() == pytest.approx(4)
