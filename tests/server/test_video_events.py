"""GET /v1/videos/{id}/events: of jobs that wait, run and are done; hanging up does not stop a job."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from denoised.cli.load import Mix, load
from tests import tiny
from tests.contract.support import folder
from tests.server.live import KEY, OTHER_KEY, Live, live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
DEFAULTS = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0, "fps": 8}
STEPS, ENDLESS = 40, 9000


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One job at a time, so that the second waits."""
    settings: dict[str, Any] = {"max_num_seqs": 1, "default_sampling_params": DEFAULTS, "drain_timeout": 0}
    place = str(tmp_path_factory.mktemp("jobs"))
    with live(folder("wan22_t2v"), key=KEY, api_key=(KEY, OTHER_KEY), jobs_folder=place, **settings) as made:
        yield made


def create(videos: Live, **body: Any) -> str:
    answer = videos.http.post("/v1/videos", json={"prompt": "a cat", "seed": 1, **body})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def stream(videos: Live, job_id: str) -> Iterator[dict[str, Any]]:
    """Over a connection of its own."""
    headers = {"Authorization": f"Bearer {videos.key}"}
    with httpx2.stream("GET", f"{videos.url}/v1/videos/{job_id}/events", headers=headers, timeout=120) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            name = line.removeprefix("event: ") if line.startswith("event: ") else name
            if line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                assert data["type"] == name
                yield data


def watching(videos: Live) -> int:
    found: int = videos.server._app.state.jobs.watchers.num_watching
    return found


def test_a_job_from_its_place_in_the_queue_to_its_end(videos: Live) -> None:
    """Previews are of the frame's size, and the video is the one that it is without anybody watching."""
    before = create(videos, num_inference_steps=ENDLESS)
    job_id = create(videos, num_inference_steps=STEPS, partial_images=2)
    events = stream(videos, job_id)
    first = next(events)
    assert (first["type"], first["status"], first["step"]) == ("video.progress", "queued", 0)
    assert next(events)["position"] == 1 if first["position"] == 0 else first["position"] == 1
    assert videos.http.delete(f"/v1/videos/{before}").status_code == 200
    rest = list(events)
    steps = [e["step"] for e in rest if e["type"] == "video.progress"]
    assert steps == sorted(steps)
    assert len(set(steps)) > STEPS // 4, "most of them are heard of"
    assert any(e["eta_seconds"] is not None for e in rest if e["type"] == "video.progress")
    pictures = [e for e in rest if e["type"] == "video.partial_image"]
    assert [e["partial_image_index"] for e in pictures] == [0, 1]
    assert all(0 < e["step"] < STEPS for e in pictures)
    assert [Image.open(io.BytesIO(base64.b64decode(e["b64_json"]))).size for e in pictures] == [(48, 32)] * 2
    assert pictures[0]["b64_json"] != pictures[1]["b64_json"]
    last = rest[-1]
    assert (last["type"], last["status"], last["receipt"]["steps"]) == ("video.completed", "completed", STEPS)
    assert {k: v for k, v in last.items() if k != "type"} == videos.http.get(f"/v1/videos/{job_id}").json()
    made = videos.http.get(f"/v1/videos/{job_id}/content").content
    body = {"prompt": "a cat", "seed": 1, "num_inference_steps": STEPS}
    assert made == videos.http.post("/v1/videos/sync", json=body).content
    assert [e["type"] for e in stream(videos, job_id)] == ["video.completed"], "of a job that is done"
    assert watching(videos) == 0


def test_hanging_up_leaves_the_job_and_deleting_it_ends_the_stream(videos: Live) -> None:
    job_id = create(videos, num_inference_steps=ENDLESS)
    left, stays = stream(videos, job_id), stream(videos, job_id)
    assert next(left)["type"] == next(stays)["type"] == "video.progress"
    videos.until(lambda: next(stays)["step"] > 0)
    assert watching(videos) == 2
    left.close()
    videos.until(lambda: watching(videos) == 1)
    step = videos.http.get(f"/v1/videos/{job_id}").json()["step"]
    videos.until(lambda: next(stays)["step"] > step)
    videos.http.delete(f"/v1/videos/{job_id}")
    assert list(stays)[-1] == {"type": "video.deleted", "id": job_id}
    videos.until(videos.idle)


def test_a_job_that_fails_says_so_last(videos: Live) -> None:
    job_id = create(videos, num_inference_steps=ENDLESS, timeout=0.5)
    last = list(stream(videos, job_id))[-1]
    assert (last["type"], last["error"]["code"]) == ("video.failed", "timeout")


def test_what_is_not_there_and_what_cannot_be(videos: Live) -> None:
    job_id = create(videos)
    other = httpx2.get(f"{videos.url}/v1/videos/{job_id}/events", headers={"Authorization": f"Bearer {OTHER_KEY}"})
    for answer in (other, videos.http.get("/v1/videos/video_0/events")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    for path, count in (("/v1/videos/sync", 1), ("/v1/videos", 4)):
        answer = videos.http.post(path, json={"prompt": "a cat", "partial_images": count})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "partial_images"), answer.text


def test_a_load_of_videos_hears_of_them_by_their_events(videos: Live) -> None:
    """It forgets them when they are done."""
    before = len(videos.http.get("/v1/videos?limit=100").json()["data"])
    mix = Mix(num_requests=4, concurrency=3, bodies=({"num_inference_steps": 12},))
    found = asyncio.run(load(videos.url, mix, key=KEY))
    assert (found.completed, found.errors) == (4, {})
    assert found.first_step_p50 is not None
    assert found.latency_p95 is not None
    assert found.first_step_p50 < found.latency_p95
    assert found.admission_wait is not None
    assert found.admission_wait > 0, "one at a time"
    assert len(videos.http.get("/v1/videos?limit=100").json()["data"]) == before


def test_a_server_that_ends_ends_its_streams(tmp_path: Path) -> None:
    """The job stays, for the next one."""
    settings: dict[str, Any] = {"default_sampling_params": DEFAULTS, "jobs_folder": str(tmp_path), "drain_timeout": 0}
    seen: list[dict[str, Any]] = []
    with live(folder("wan22_t2v"), **settings) as server:
        events = stream(server, create(server, num_inference_steps=ENDLESS))
        seen.append(next(events))
        reader = threading.Thread(target=lambda: seen.extend(events))
        reader.start()
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert {e["type"] for e in seen} == {"video.progress"}
