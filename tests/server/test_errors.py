"""What is refused: every error in OpenAI's shape, with the field, the value and the way out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest

from denoised.outputs import ErrorKind
from denoised.server.problems import of_kind
from tests import tiny
from tests.server.live import OTHER_KEY, Live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
ASK = {"prompt": "x"}
SAY = {"messages": [{"role": "user", "content": "x"}]}

# Route, body, status, param, what the message says.
TABLE: list[tuple[str, Any, int, str | None, str]] = [
    (IMAGES, {}, 400, "prompt", "prompt is missing"),
    (IMAGES, {"prompt": 3}, 400, "prompt", "must be a string"),
    (IMAGES, {"prompt": "\ud800"}, 400, "prompt", "no text"),
    (IMAGES, {"prompt": "x" * 30_000}, 400, "prompt", "30000 characters"),
    (IMAGES, [], 400, None, "must be a JSON object"),
    (IMAGES, ASK | {"promt": 1}, 400, "promt", "did you mean prompt?"),
    (IMAGES, ASK | {"num_infrence_steps": 1}, 400, "num_infrence_steps", "did you mean num_inference_steps?"),
    (IMAGES, ASK | {"wholly_else": 1}, 400, "wholly_else", "leave it out"),
    (IMAGES, ASK | {"style": "vivid"}, 400, "style", "cannot honour"),
    (IMAGES, ASK | {"user": "me"}, 400, "user", "cannot honour"),
    (IMAGES, ASK | {"moderation": "low"}, 400, "moderation", "cannot honour"),
    (IMAGES, ASK | {"quality": "hd"}, 400, "quality", "must be 'auto'"),
    (IMAGES, ASK | {"response_format": "url"}, 400, "response_format", "must be 'b64_json'"),
    (IMAGES, ASK | {"output_format": "svg"}, 400, "output_format", "'png', 'jpeg' or 'webp'"),
    (IMAGES, ASK | {"output_compression": 9}, 400, "output_compression", "use output_format jpeg or webp"),
    (IMAGES, ASK | {"background": "transparent"}, 400, "background", "makes opaque images"),
    (IMAGES, ASK | {"partial_images": 2}, 400, None, "set stream=true"),
    (IMAGES, ASK | {"partial_images": 4, "stream": True}, 400, "partial_images", "must be at most 3"),
    (IMAGES, ASK | {"n": 0}, 400, "n", "must be at least 1"),
    (IMAGES, ASK | {"n": 5}, 400, "n", "must be at most 4"),
    (IMAGES, ASK | {"n": "2"}, 400, "n", "must be a whole number"),
    (IMAGES, ASK | {"n": 2, "num_outputs_per_prompt": 3}, 400, "n", "both given"),
    (IMAGES, ASK | {"size": "big"}, 400, "size", "WIDTHxHEIGHT"),
    (IMAGES, ASK | {"size": "100x100"}, 400, "height", "use 96 or 112"),
    (IMAGES, ASK | {"size": "512x512"}, 400, "height", "max_pixels"),
    (IMAGES, ASK | {"size": "64x64", "width": 32}, 400, "size", "both given"),
    (IMAGES, ASK | {"num_inference_steps": 0}, 400, "num_inference_steps", "at least 1"),
    (IMAGES, ASK | {"num_frames": 5}, 400, "num_frames", "does not take it"),
    (IMAGES, ASK | {"fps": 5}, 400, "fps", "makes no video"),
    (IMAGES, ASK | {"sigmas": []}, 400, "sigmas", "at least 1"),
    (IMAGES, ASK | {"sigmas": [1.0], "timesteps": [1.0]}, 400, "sigmas", "both given"),
    (IMAGES, ASK | {"timeout": 0}, 400, "timeout", "more than 0"),
    (IMAGES, ASK | {"priority": 1}, 400, "priority", "at most 0 here"),
    (IMAGES, ASK | {"lora_scale": 1.0}, 400, "lora_scale", "no lora_request for it to act on"),
    (IMAGES, ASK | {"lora": {"lora_path": "/etc/passwd"}}, 400, "lora_path", "in no folder that this server reads"),
    (IMAGES, ASK | {"extra_args": {"lora_request": "/x"}}, 400, "extra_args", "give it as lora_request"),
    (IMAGES, ASK | {"latents": [0]}, 400, "latents", "cannot be given over HTTP"),
    (IMAGES, ASK | {"extra_args": {"nope": 1}}, 400, "extra_args", "not known"),
    (IMAGES, ASK | {"extra_args": {"image": "/etc/passwd"}}, 400, "extra_args", "must not name a file"),
    (IMAGES, ASK | {"model": "nope"}, 404, "model", "serves shapes"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": SAY["messages"] * 2}, 400, "messages", "at most 1"),
    (CHAT, {"messages": [{"role": "system", "content": "x"}]}, 400, "messages.0.role", "must be 'user'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, None, "image_url"),
    (CHAT, SAY | {"stream": True}, 400, "stream", "must be False"),
    (CHAT, SAY | {"temperature": 1}, 400, "temperature", "samples no tokens"),
    (CHAT, SAY | {"n": 1, "extra_body": {"n": 1}}, 400, None, "given twice"),
    ("/v1/videos", ASK, 400, "model", "makes images"),
    ("/v1/videos/sync", ASK, 400, "model", "makes images"),
    ("/v1/audio/generate", {"input": "x"}, 400, "model", "makes images"),
    ("/v1/load_lora_adapter", {}, 400, "lora_name", "lora_name is missing"),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}, 400, "lora_path", "in no folder"),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}, 404, "lora_name", "no adapter is loaded under it"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), TABLE)
def test_refusals(shapes: Live, path: str, body: Any, status: int, param: str | None, says: str) -> None:
    submitted = shapes.stats().submitted_total
    answer = shapes.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert says in error["message"]
    assert error["message"].endswith((".", "?"))
    assert (param is None) or (error["param"] == param), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert shapes.stats().submitted_total == submitted, "what is refused is never queued"


def test_openai_client_raises_its_own_errors(shapes: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shapes.client.images.generate(prompt="x", size="100x100")  # type: ignore[arg-type]
    assert caught.value.param == "height"
    with pytest.raises(openai.NotFoundError):
        shapes.client.images.generate(prompt="x", model="dall-e-3")


@pytest.mark.parametrize("authorization", [None, "Bearer nobody", "Basic key-of-a", "key-of-a"])
def test_keys(shapes: Live, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    for method, path in (("GET", "/v1/models"), ("POST", IMAGES), ("GET", "/metrics"), ("GET", "/openapi.json")):
        answer = httpx2.request(method, shapes.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx2.get(shapes.url + "/health", headers=headers).status_code == 200


def test_keys_are_not_kept(shapes: Live) -> None:
    assert "key-of" not in repr(shapes.server.serving.config)
    assert all("key-of" not in key for key in shapes.server.serving.config.api_key)
    with shapes.client_of(OTHER_KEY) as other:
        assert other.models.list().data[0].id == "shapes"


def test_bodies_that_are_none(shapes: Live) -> None:
    post = shapes.http.post
    json_type = {"Content-Type": "application/json"}
    assert post(IMAGES, content=b"{", headers=json_type).status_code == 400
    assert post(IMAGES, content=b"\xff", headers=json_type).status_code == 400
    assert post(IMAGES, content=b'{"prompt": NaN}', headers=json_type).status_code == 400
    assert post(IMAGES, content=b"[" * 100_000, headers=json_type).status_code == 400
    assert post(IMAGES, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert post(IMAGES, content=b"x" * (2**20 + 1), headers=json_type).status_code == 413
    assert post(IMAGES, content=(b"x" * 2**16 for _ in range(20)), headers=json_type).status_code == 413
    assert shapes.http.get(IMAGES).status_code == 405
    assert shapes.http.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_cors(shapes: Live) -> None:
    """Pages of the named origin may ask, without a key; others may not."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    own = shapes.http.options(IMAGES, headers={"Origin": "https://ok.example", **asks})
    assert own.headers["access-control-allow-origin"] == "https://ok.example"
    other = shapes.http.options(IMAGES, headers={"Origin": "https://bad.example", **asks})
    assert "access-control-allow-origin" not in other.headers


def test_full_queue_is_429_with_the_time_to_wait(shapes: Live) -> None:
    """Two run, two wait, the others are told when to come back; who was accepted is served."""

    async def flood() -> list[Any]:
        async with shapes.async_client() as client:
            body = {"num_inference_steps": 6}
            many = [client.images.generate(prompt=f"{i} red circles", extra_body=body) for i in range(10)]
            return await asyncio.gather(*many, return_exceptions=True)

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    served = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len(refused) + len(served) == 10
    assert 1 <= len(refused) <= 6
    assert all(int(error.response.headers["Retry-After"]) >= 1 for error in refused)
    assert all(error.code == "queue_full" for error in refused)


@pytest.mark.parametrize(
    ("kind", "status", "retry"),
    [("out_of_memory", 507, False), ("engine", 500, False), ("timeout", 504, False), ("aborted", 503, True)],
)
def test_statuses_of_errors_that_no_test_can_cause(kind: ErrorKind, status: int, retry: bool) -> None:
    found = of_kind(kind, "what happened.")
    assert found.status_code == status
    assert ("x-should-retry" in (found.headers or {})) is not retry


def test_models_health_and_metrics(shapes: Live) -> None:
    [model] = shapes.client.models.list().data
    assert model.kind == "image"  # type: ignore[attr-defined]
    assert "true_cfg_scale" in model.parameters  # type: ignore[attr-defined]
    assert shapes.client.models.retrieve("shapes").id == "shapes"
    assert shapes.http.get("/health").json() == {"status": "ready", "reason": None, "model": "shapes"}
    before = _metrics(shapes)
    shapes.client.images.generate(prompt="x", extra_body={"num_inference_steps": 3})
    shapes.http.get("/v1/videos/none-of-these")
    after = _metrics(shapes)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew('denoised_steps_total{replica="0"}') == 3
    assert grew("denoised_completed_total") == 1
    assert grew('denoised_stage_seconds_total{replica="0",stage="denoise"}') > 0
    assert grew('denoised_http_requests_total{method="POST",route="/v1/images/generations",status="200"}') == 1
    assert grew('denoised_http_requests_total{method="GET",route="/v1/videos/{video_id}",status="404"}') == 1
    assert after['denoised_replica_ready{replica="0"}'] == 1


def _metrics(shapes: Live) -> dict[str, float]:
    lines = [line for line in shapes.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
