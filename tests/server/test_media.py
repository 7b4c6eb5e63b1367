"""Videos as jobs and at once, and sound."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import tempfile
import time
import wave
from collections.abc import Iterator
from typing import Any

import imageio_ffmpeg
import openai
import pytest

from tests import tiny
from tests.contract.support import folder
from tests.server.live import KEY, OTHER_KEY, Live, live
from tests.server.test_edits import png
from tests.server.test_images import hang_up
from tests.tiny.pictures import picture as drawn

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),  # the official client, of OpenAI's own
]
DEFAULTS = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0, "fps": 8}


@pytest.fixture(scope="module")
def videos() -> Iterator[Live]:
    with live(
        folder("wan22_t2v"),
        key=KEY,
        api_key=(KEY, OTHER_KEY),
        served_model_name="wan",
        max_jobs=6,
        default_sampling_params=DEFAULTS,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def animator() -> Iterator[Live]:
    with live(folder("wan22_i2v"), default_sampling_params=DEFAULTS) as made:
        yield made


@pytest.fixture(scope="module")
def sound() -> Iterator[Live]:
    with live(folder("stable_audio"), default_sampling_params={"num_inference_steps": 3}) as made:
        yield made


def video(raw: bytes) -> tuple[int, list[int], float]:
    """How many frames, [width, height], frames a second."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(raw)
        file.flush()
        count, _ = imageio_ffmpeg.count_frames_and_secs(file.name)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", file.name]
        told = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"Video: .* (\d+)x(\d+)[ ,].* ([\d.]+) fps", told)
    assert found, told
    return count, [int(found[1]), int(found[2])], float(found[3])


def test_job_from_start_to_end(videos: Live) -> None:
    job = videos.client.videos.create_and_poll(prompt="a cat", poll_interval_ms=50, extra_body={"seed": 1})  # type: ignore[arg-type]
    assert (job.status, job.progress, job.model, job.prompt) == ("completed", 100, "wan", "a cat")
    assert (job.seconds, job.size) == ("1.125", "48x32")
    assert (job.receipt["steps"], job.receipt["model"]) == (3, "wan")  # type: ignore[attr-defined]
    answer = videos.client.videos.download_content(job.id)
    assert video(answer.content) == (9, [48, 32], 8)
    assert "3 steps" in answer.response.headers["X-Denoised-Receipt"]
    same = videos.http.post("/v1/videos/sync", json={"prompt": "a cat", "seed": 1})
    assert same.headers["content-type"] == "video/mp4"
    assert same.content == answer.content
    assert "3 steps" in same.headers["X-Denoised-Receipt"]
    other = videos.http.post("/v1/videos/sync", json={"prompt": "a cat", "seed": 2})
    assert other.content != answer.content


@pytest.mark.parametrize(
    ("body", "count", "fps"),
    [({"seconds": "2"}, 17, 8), ({"seconds": 1.5, "fps": 16}, 25, 16), ({"num_frames": 5}, 5, 8)],
)
def test_length(videos: Live, body: dict[str, Any], count: int, fps: float) -> None:
    """Seconds become the nearest number of frames that the model can make, at the request's frame rate."""
    raw = videos.http.post("/v1/videos/sync", json={"prompt": "a cat", "size": "32x32", **body}).content
    assert video(raw) == (count, [32, 32], fps)


def test_progress_is_true_and_delete_stops_the_work(videos: Live) -> None:
    job = videos.client.videos.create(prompt="a cat", extra_body={"num_inference_steps": 400})
    seen = []
    while not seen or seen[-1].step < 6:  # type: ignore[attr-defined]
        seen.append(videos.client.videos.retrieve(job.id))
        time.sleep(0.02)
    steps: list[Any] = [one.step for one in seen]  # type: ignore[attr-defined]
    assert steps == sorted(steps)
    assert all(one.progress == 100 * one.step // 400 for one in seen)  # type: ignore[attr-defined]
    assert seen[-1].status == "in_progress"
    assert seen[-1].total_steps == 400  # type: ignore[attr-defined]
    with pytest.raises(openai.ConflictError, match="ask again when it is completed"):
        videos.client.videos.download_content(job.id)
    before = videos.stats()
    assert videos.client.videos.delete(job.id).deleted
    videos.until(videos.idle, 20)
    after = videos.stats()
    assert after.errors_total["aborted"] == before.errors_total.get("aborted", 0) + 1
    assert after.time_to_free.latest < 5
    assert videos.server.serving.num_running == 0
    with pytest.raises(openai.NotFoundError):
        videos.client.videos.retrieve(job.id)


@pytest.mark.parametrize(
    ("fixture", "path", "body"),
    [
        ("videos", "/v1/videos/sync", {"prompt": "a cat", "num_inference_steps": 9000}),
        ("sound", "/v1/audio/generate", {"input": "rain", "num_inference_steps": 9000}),
    ],
)
def test_hanging_up_stops_the_work(request: pytest.FixtureRequest, fixture: str, path: str, body: Any) -> None:
    server: Live = request.getfixturevalue(fixture)
    hang_up(server, path, body)
    assert server.stats().errors_total["aborted"] >= 1
    assert server.stats().time_to_free.latest < 5


def test_jobs_belong_to_their_key(videos: Live) -> None:
    job = videos.client.videos.create(prompt="a cat")
    with videos.client_of(OTHER_KEY) as other:
        for act in (other.videos.retrieve, other.videos.delete, other.videos.download_content):
            with pytest.raises(openai.NotFoundError):
                act(job.id)
        assert job.id not in [one.id for one in other.videos.list().data]
    assert videos.client.videos.retrieve(job.id).id == job.id
    videos.until(videos.idle, 20)


def test_pages_and_the_oldest_make_room(videos: Live) -> None:
    made = []
    for i in range(7):
        made.append(videos.client.videos.create(prompt=f"{i} cats", extra_body={"num_inference_steps": 1}).id)
        videos.until(videos.idle, 20)
        videos.until(lambda: videos.client.videos.retrieve(made[-1]).status == "completed", 20)
    first = videos.client.videos.list(limit=4)
    assert [job.id for job in first.data] == made[:-5:-1]
    assert first.has_more
    assert [job.id for job in first] == made[:0:-1], "the client turns the pages; the oldest is gone"
    assert [job.id for job in videos.client.videos.list(limit=2, order="asc").data] == made[1:3]
    with pytest.raises(openai.NotFoundError):
        videos.client.videos.download_content(made[0])


def test_job_that_fails_says_why(videos: Live) -> None:
    job = videos.client.videos.create(prompt="a cat", extra_body={"timeout": 0.3, "num_inference_steps": 2000})
    videos.until(lambda: videos.client.videos.retrieve(job.id).status == "failed", 30)
    error = videos.client.videos.retrieve(job.id).error
    assert error is not None
    assert error.code == "timeout"
    assert "timeout=0.3 s" in error.message
    videos.client.videos.delete(job.id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": "2", "num_frames": 5}, "num_frames"),
        ({"num_frames": 6}, "num_frames"),
        ({"num_outputs_per_prompt": 2}, "num_outputs_per_prompt"),
        ({"input_reference": {"image_url": "https://example.com/x.png"}}, "input_reference"),
        ({"input_reference": {"file_id": "x"}}, "input_reference.file_id"),
        ({"fsp": 8}, "fsp"),
        ({"size": "33x33"}, "height"),
    ],
)
def test_refusals(videos: Live, body: dict[str, Any], param: str) -> None:
    jobs = len(videos.client.videos.list().data)
    for path in ("/v1/videos", "/v1/videos/sync"):
        answer = videos.http.post(path, json={"prompt": "x", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(videos.client.videos.list().data) == jobs
    assert videos.http.get("/v1/videos?limit=0").status_code == 400
    assert videos.http.get("/v1/videos?lmit=1").json()["error"]["message"] == "lmit is not known; leave it out."
    assert videos.http.get("/v1/videos?after=none").status_code == 400
    assert videos.http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 400


def test_video_from_a_picture(animator: Live) -> None:
    """As an upload by the official client, as a data: URL in JSON and in a form: the same video."""
    raw = png(drawn(64, 64, seed=1))
    url = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    client = animator.client
    job = client.videos.create_and_poll(
        prompt="a cat",
        input_reference=("x.png", raw, "image/png"),
        poll_interval_ms=50,
        extra_body={"seed": 1},  # type: ignore[arg-type]
    )
    first = client.videos.download_content(job.id).content
    body = {"prompt": "a cat", "seed": 1, "input_reference": {"image_url": url}}
    assert animator.http.post("/v1/videos/sync", json=body).content == first
    form = {"prompt": "a cat", "seed": "1", "input_reference[image_url]": url}
    assert animator.http.post("/v1/videos/sync", data=form).content == first
    unlike = png(drawn(64, 64, seed=2))
    files = {"input_reference": ("x.png", unlike), "prompt": (None, "a cat"), "seed": (None, "1")}
    assert animator.http.post("/v1/videos/sync", files=files).content != first  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="image is missing"):
        client.videos.create(prompt="a cat")


def test_sound(sound: Live) -> None:
    def made(**body: Any) -> tuple[int, int, bytes]:
        answer = sound.http.post("/v1/audio/generate", json={"input": "rain", "seed": 1, **body})
        assert answer.headers["content-type"] == "audio/wav", answer.text
        assert "3 steps" in answer.headers["X-Denoised-Receipt"]
        with wave.open(io.BytesIO(answer.content)) as file:
            return file.getnchannels(), file.getframerate(), file.readframes(file.getnframes())

    channels, rate, samples = made(audio_length=4.0)
    assert (channels, rate) == (2, 64)
    assert len(samples) == 4 * 64 * 2 * 2
    assert made(audio_length=4.0)[2] == samples
    assert len(made(extra_args={"audio_end_in_s": 6.0})[2]) == 6 * 64 * 2 * 2
    assert made(audio_length=4.0, seed=2)[2] != samples
    too_long = sound.http.post("/v1/audio/generate", json={"input": "rain", "audio_length": 1000})
    assert too_long.status_code == 400, "which the pipeline says itself"
    assert "longer than" in too_long.json()["error"]["message"]
    for body in ({"response_format": "mp3"}, {"audio_length": 0}, {"voice": "x"}, {"num_outputs_per_prompt": 2}):
        assert sound.http.post("/v1/audio/generate", json={"input": "rain", **body}).status_code == 400
