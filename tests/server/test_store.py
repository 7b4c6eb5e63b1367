"""Jobs in a folder: a restart loses nothing, the same key gives the same job, and webhooks are signed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from denoised import OmniDiffusionSamplingParams
from denoised.errors import InvalidConfigError
from denoised.request import Service
from denoised.server import kept_asks
from denoised.server.asks import Ask
from denoised.server.jobs import Job, JobStatus
from denoised.server.problems import Refusal
from denoised.server.store import SqliteStore
from denoised.server.webhooks import Webhooks, signed
from tests import tiny
from tests.contract.support import folder
from tests.server.live import Live, live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
SECRET = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ="
DEFAULTS = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0, "fps": 8}


def job(job_id: str, status: JobStatus = "queued", **more: Any) -> Job:
    done = {"completed_at": 100} if status in ("completed", "failed") else {}
    return Job(
        **{"id": job_id, "tenant": "a", "created_at": 1, "model": "m", "prompt": "p", "body": {}} | done | more,
        status=status,
    )


def opened(path: Path, **changes: Any) -> SqliteStore:
    return SqliteStore(path, **{"limit": 10, "max_age": 1000.0, "clock": lambda: 200.0, **changes})


# ------------------------------------------------------------------ the store


def test_what_was_put_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first = job("one", key="k", ask={"x": [1]}, receipt={"steps": 3})
    store.put(first)
    store.put(job("two", "completed", webhook="http://x"))
    store.put(dataclasses.replace(first, step=7, ask=None))
    store.keep_checkpoint("one", b"abc")
    store.file("two").write_bytes(b"video")
    store.close()
    store = opened(tmp_path)
    again = store.get("one")
    assert again == dataclasses.replace(first, step=7), "what was asked is written once"
    assert [found.id for found in store.all("a")] == ["one", "two"]
    assert store.all("b") == []
    assert [found.id for found in store.unfinished()] == ["one"]
    assert [found.id for found in store.untold()] == ["two"]
    assert store.by_key("a", "k") == again
    assert store.by_key("b", "k") is None
    assert store.checkpoint("one") == b"abc"
    assert store.file("two").read_bytes() == b"video"
    store.put(dataclasses.replace(again, status="completed", completed_at=150))
    assert store.checkpoint("one") is None, "nobody goes on with what is done"
    store.remove("two")
    assert not store.file("two").exists()
    store.close()


def test_old_jobs_make_room_and_what_is_half_done_is_swept(tmp_path: Path) -> None:
    store = opened(tmp_path, limit=2)
    for name in ("a1", "a2", "a3"):
        store.put(job(name, "completed"))
        store.file(name).write_bytes(b"x")
    assert [found.id for found in store.all("a")] == ["a2", "a3"]
    assert not store.file("a1").exists()
    store.close()
    for stray in ("files/nobody.mp4", "checkpoints/a2.part"):
        (tmp_path / stray).write_bytes(b"x")
    store = opened(tmp_path, clock=lambda: 1101.0)
    assert store.all("a") == [], "older than max_age"
    assert not [p for part in ("files", "checkpoints") for p in (tmp_path / part).iterdir()]
    store.close()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(InvalidConfigError, match="another server has it"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfigError, match="cannot be written"):
        opened(tmp_path / "file")


def test_an_ask_comes_back_as_it_was() -> None:
    picture = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    ask = Ask(
        request_id="r",
        prompt={"prompt": "p", "multi_modal_data": {"image": [picture]}},
        params=OmniDiffusionSamplingParams(guidance_scale=1.0, num_outputs_per_prompt=1, extra_args={"a": [1.5]}),
        service=Service(tenant="t", priority=2),
    )
    lasting = kept_asks.lasting(ask, checkpoint_every=3)
    back = kept_asks.unpack(json.loads(json.dumps(kept_asks.pack(lasting))))
    assert back.service == Service(tenant="t", priority=2, checkpoint_every=3)
    assert back.params == lasting.params
    assert back.params._given == {"guidance_scale", "num_outputs_per_prompt", "extra_args", "seed"}
    image = back.prompt["multi_modal_data"]["image"][0]
    assert (image.mode, image.tobytes()) == ("RGBA", picture.tobytes())
    assert kept_asks.digest(ask) == kept_asks.digest(dataclasses.replace(ask, request_id="other"))
    assert kept_asks.digest(ask) != kept_asks.digest(dataclasses.replace(ask, prompt={"prompt": "q"}))


# ------------------------------------------------------------------ webhooks


class Receiver(HTTPServer):
    """Hears webhooks; the first `deaf` of them it answers with an error."""

    def __init__(self, deaf: int) -> None:
        super().__init__(("127.0.0.1", 0), Hear)
        self.deaf, self.heard = deaf, list[tuple[dict[str, str], bytes]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?a=b"


class Hear(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.append((dict(self.headers), body))
        self.send_response(500 if len(self.server.heard) <= self.server.deaf else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(deaf=2) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_webhook_is_signed_as_openais_client_checks_it_and_tried_again(receiver: Receiver) -> None:
    webhooks = Webhooks(SECRET, allow_private=True, delays=(0, 0, 0))
    assert asyncio.run(webhooks.tell(job("video_1", "completed", webhook=receiver.url)))
    assert len(receiver.heard) == 3
    headers, body = receiver.heard[-1]
    event = openai.OpenAI(api_key="-").webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, event.data.id) == ("video.completed", "video_1")  # type: ignore[union-attr,attr-defined]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="-").webhooks.unwrap(body + b" ", headers, secret=SECRET)
    assert not asyncio.run(Webhooks(SECRET, allow_private=True, delays=()).tell(job("b", webhook=receiver.url)))


def test_webhooks_without_a_secret_and_to_private_addresses_are_refused(receiver: Receiver) -> None:
    with pytest.raises(Refusal, match="signs none"):
        Webhooks(None, allow_private=True).check(receiver.url)
    private = Webhooks(SECRET, allow_private=False, delays=(0,))
    for url in (receiver.url, "http://[::1]/", "ftp://x", "http://169.254.169.254/"):
        with pytest.raises(Refusal):
            private.check(url)
    assert not asyncio.run(private.tell(job("b", webhook=receiver.url))), "nor when a name has moved meanwhile"
    assert receiver.heard == []
    assert "secret" not in str(signed(b"", event_id="e", at=1, secret="secret"))


# ------------------------------------------------------------------ through the server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Live]:
    with live(
        folder("wan22_t2v"),
        jobs_folder=str(place),
        webhook_secret=SECRET,
        allow_private_webhooks=True,
        default_sampling_params=DEFAULTS,
    ) as made:
        yield made


def status(server: Live, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/v1/videos/{job_id}").json()
    return found


def test_the_same_key_gives_the_same_job(server: Live, receiver: Receiver) -> None:
    receiver.deaf = 0
    headers = {"Idempotency-Key": "k1"}
    body = {"prompt": "a bird", "webhook": receiver.url}
    first, second = (server.http.post("/v1/videos", json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = server.http.post("/v1/videos", json={"prompt": "a cat"}, headers=headers)
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    server.until(lambda: status(server, first["id"])["status"] == "completed")
    server.until(lambda: receiver.heard)
    assert json.loads(receiver.heard[0][1])["data"] == {"id": first["id"]}
    assert server.http.post("/v1/videos", json=body, headers=headers).json()["status"] == "completed"
    assert len(server.http.get("/v1/videos").json()["data"]) == 1


def test_a_webhook_that_would_not_be_called_is_refused(server: Live) -> None:
    for route, body in (("/v1/videos", {"webhook": "nowhere"}), ("/v1/videos/sync", {"webhook": "http://x.example"})):
        answer = server.http.post(route, json={"prompt": "p", **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "webhook"
