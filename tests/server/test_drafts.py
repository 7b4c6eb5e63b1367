"""Fork and pick over HTTP: a draft that goes on is the undisturbed picture, computed once; what is kept is bounded."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from denoised.outputs import OmniRequestOutput, Progress, Saved
from denoised.server.drafting import Goal, begin, goal, num_steps
from denoised.server.kept_drafts import Draft, KeptDrafts
from denoised.server.problems import Refusal
from denoised.server.settings import MIB, ServerConfig
from tests import tiny
from tests.server.live import OTHER_KEY, Live
from tests.server.test_images import PROMPT, hang_up, picture

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
DRAFTS = "/v1/images/drafts"
ASK = {"prompt": PROMPT, "num_inference_steps": 8}


def made(shapes: Live, **body: Any) -> list[dict[str, Any]]:
    answer = shapes.http.post(DRAFTS, json=ASK | body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def going_on(draft: dict[str, Any]) -> str:
    return f"{DRAFTS}/{draft['id']}/continue"


def pictured(answer: dict[str, Any]) -> np.ndarray:
    return picture(answer["data"][0]["b64_json"]).astype(int)


def events(shapes: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with shapes.http.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def held(shapes: Live) -> int:
    number: int = shapes.server._app.state.drafts.num_bytes
    return number


def test_draft_goes_on_to_the_picture_that_it_would_have_been(shapes: Live) -> None:
    """Alone in the engine: to the byte, in the steps that were left, two rows each. So is the draft the preview."""
    asked = ASK | {"num_inference_steps": 16, "seed": 5}
    seen = events(shapes, "/v1/images/generations", asked | {"partial_images": 3})
    partial = next(event for event in seen if event["type"] == "image_generation.partial_image")
    [draft] = made(shapes, **asked, n=1, draft_steps=4)
    assert (draft["seed"], draft["step"], draft["total_steps"], draft["size"]) == (5, 4, 16, "128x128")
    shown = partial if draft["pictured_step"] == 4 else seen[-1]  # the last, on a machine that is very slow to hear
    assert shown["b64_json"] == draft["pictures"][0]["b64_json"]
    answer = shapes.http.post(going_on(draft), json={}).json()
    receipt = answer["receipt"]
    assert (receipt["steps"], receipt["resumed_from_step"], receipt["seed"]) == (16, 4, 5)
    assert receipt["ranks"][0]["forwards"] == 2 * (16 - 4), "counted where they ran"
    assert answer["data"] == [{"b64_json": seen[-1]["b64_json"]}]


def test_several_drafts_and_their_stream(shapes: Live) -> None:
    """Seeds count up; the one that is picked is the picture of its seed, within the rounding of joined rows."""
    seen = events(shapes, DRAFTS, ASK | {"n": 2, "draft_steps": 4, "seed": 40, "output_format": "jpeg"})
    kinds = [event["type"].removeprefix("image_draft.") for event in seen]
    assert set(kinds) == {"progress", "partial_image", "completed"}
    done = {event["index"]: event for event in seen if event["type"] == "image_draft.completed"}
    assert {index: (draft["seed"], draft["step"]) for index, draft in done.items()} == {0: (40, 4), 1: (41, 4)}
    assert {event["draft_step"] for event in seen if event["type"] == "image_draft.progress"} == {4}
    went = events(shapes, going_on(done[1]), {"partial_images": 1, "timeout": 60})
    steps = [event["step"] for event in went if event["type"] == "image_generation.progress" and event["step"]]
    assert steps == [4, 5, 6, 7, 8]
    [final] = [event for event in went if event["type"] == "image_generation.completed"]
    assert final["receipt"]["resumed_from_step"] == 4
    whole = shapes.http.post("/v1/images/generations", json=ASK | {"seed": 41}).json()
    assert np.abs(picture(final["b64_json"]).astype(int) - pictured(whole)).max() <= 1


def test_drafts_belong_to_their_key_until_they_are_deleted(shapes: Live) -> None:
    [draft] = made(shapes, n=1)
    assert draft["step"] == 2, "a quarter of the steps, unless it is said"
    theirs = {"Authorization": f"Bearer {OTHER_KEY}"}
    listed = shapes.http.get(DRAFTS).json()["data"]
    assert draft["id"] in [one["id"] for one in listed]
    assert shapes.http.get(DRAFTS, headers=theirs).json()["data"] == []
    for method, path in (("POST", going_on(draft)), ("DELETE", f"{DRAFTS}/{draft['id']}")):
        body = {"json": {}} if method == "POST" else {}
        assert shapes.http.request(method, path, headers=theirs, **body).status_code == 404
    bytes_before = held(shapes)
    assert shapes.http.delete(f"{DRAFTS}/{draft['id']}").json()["deleted"] is True
    assert held(shapes) < bytes_before
    gone = shapes.http.post(going_on(draft), json={})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_draft_is_continued_once_at_a_time_and_hanging_up_ends_that(shapes: Live) -> None:
    shapes.until(shapes.idle)
    before = shapes.stats().work.rows_total
    [draft] = made(shapes, n=1, num_inference_steps=900, draft_steps=1)
    shapes.until(lambda: shapes.stats().work.rows_total > before, 10)
    ran = shapes.stats().work.rows_total - before
    assert ran < 2 * 90, "of its step, and of those that ran while its picture was made"
    answers: list[int] = []

    def second() -> None:
        shapes.until(lambda: shapes.server.serving.num_running)
        answers.append(shapes.http.post(going_on(draft), json={}).status_code)
        answers.append(shapes.http.post(going_on(draft), json={"stream": True}).status_code)

    thread = threading.Thread(target=second)
    thread.start()
    with shapes.http.stream("POST", going_on(draft), json={"stream": True}) as answer:
        assert answer.status_code == 200
        thread.join(60)
    assert answers == [409, 409]
    shapes.until(shapes.idle, 20)
    hang_up(shapes, going_on(draft), {})
    assert shapes.http.get(DRAFTS).json()["data"], "it can be continued once more"


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_while_drafts_are_made_stops_all_and_keeps_none(shapes: Live, stream: bool) -> None:
    before = held(shapes)
    body = {"prompt": PROMPT, "num_inference_steps": 9000, "draft_steps": 900, "n": 3, "stream": stream}
    hang_up(shapes, DRAFTS, body)
    shapes.until(lambda: not shapes.server.serving.num_running, 10)
    assert held(shapes) == before


def test_drafts_of_one_who_hangs_up_are_forgotten(shapes: Live) -> None:
    """Also those that were done when he did: nobody knows of them."""

    def known() -> set[str]:
        return {draft["id"] for draft in shapes.http.get(DRAFTS).json()["data"]}

    before = known()
    with shapes.http.stream("POST", DRAFTS, json=ASK | {"n": 4, "draft_steps": 2, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line == "event: image_draft.completed")
        [mine] = [json.loads(next(lines).removeprefix("data: "))["id"]]
        assert mine in known() - before
    shapes.until(lambda: not shapes.server.serving.num_running, 20)
    shapes.until(lambda: mine not in known(), 10)
    assert known() <= before


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"draft_steps": 8}, "draft_steps", "fewer than the 8 steps"),
    ({"draft_steps": 0}, "draft_steps", "at least 1"),
    ({"n": 5}, "n", "must be at most 4"),
    ({"partial_images": 1, "stream": True}, "partial_images", "a preview itself"),
    ({"num_outputs_per_prompt": 2}, "num_outputs_per_prompt", "use n"),
    ({"size": "100x100"}, "height", "use 96 or 112"),
    ({"output_compression": 3}, "output_compression", "jpeg or webp"),
    ({"drafts": 3}, "drafts", "not known"),
]


@pytest.mark.parametrize(("body", "param", "says"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(shapes: Live, body: dict[str, Any], param: str, says: str, stream: bool) -> None:
    """Before anything runs, and never in a stream that has begun."""
    answer = shapes.http.post(DRAFTS, json={"stream": stream} | ASK | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]
    assert shapes.http.post(f"{DRAFTS}/none/continue", json={}).status_code == 404


def test_where_a_draft_ends() -> None:
    """At most where it was asked to, at a step of which there is a preview."""
    for total in range(2, 60):
        for wanted in range(1, total):
            found = goal(wanted, total)
            assert 1 <= found.step <= wanted
            due = next(step for step in range(1, total) if step * (found.num_previews + 1) // total > 0)
            assert due == found.step
    assert goal(None, 20) == Goal(step=5, num_previews=3)
    assert goal(7, None).step == 7
    assert num_steps({}, {"sigmas": [1.0, 0.5]}, {"num_inference_steps": 9}) == 2
    assert num_steps({}, {}, {}) is None


class Told:
    """A run whose events are given."""

    def __init__(self, *events: Any) -> None:
        self._events, self.ended = events, 0

    async def events(self) -> AsyncIterator[Any]:
        for event in self._events:
            yield event

    async def end(self) -> None:
        self.ended += 1


def test_picture_that_is_done_before_its_preview_shows_its_draft() -> None:
    """Steps may be faster than decoding; what was kept stays what it was. Nothing kept is an error."""
    progress = Progress(request_id="r", step=3, total_steps=4)
    saved = [Saved(request_id="r", step=step, checkpoint=step) for step in (2, 4)]
    output = OmniRequestOutput(request_id="r", prompt={"prompt": "x"}, images=["final"])

    async def begun(*events: Any) -> Any:
        run: Any = Told(*events)
        seen = [one async for _, one in begin([run])]
        assert run.ended == 1
        return seen[-1]

    found = asyncio.run(begun(progress, *saved, output))
    assert (found.saved.step, found.images, found.pictured_step, found.total_steps) == (2, ["final"], 4, 4)
    with pytest.raises(Refusal, match="before a draft could be kept"):
        asyncio.run(begun(progress, output))


# ------------------------------------------------------------------ what is kept


def draft(number: int, *, tenant: str = "a", family: str = "", size: int = MIB, now: float = 0.0) -> Draft:
    return Draft(
        id=f"d{number}",
        family=family or f"family-{number}",
        tenant=tenant,
        model="m",
        prompt="p",
        checkpoint=None,
        num_bytes=size,
        seed=1,
        step=1,
        total_steps=2,
        created_at=now,
        expires_at=now + 60,
    )


def test_number_bytes_and_age_of_drafts_are_bounded() -> None:
    now = 0.0

    async def run() -> None:
        nonlocal now
        kept = KeptDrafts(ServerConfig(max_drafts=3, max_drafts_mb=4, draft_minutes=1), clock=lambda: now)
        kept.keep(draft(1, tenant="b"))
        for number in (2, 3, 4):
            kept.keep(draft(number))
        assert [d.id for d in kept.all("a")] == ["d3", "d4"], "who has most makes room, the oldest first"
        assert [d.id for d in kept.all("b")] == ["d1"]
        kept.keep(draft(5, size=3 * MIB, now=30))
        assert kept.num_bytes == 4 * MIB
        now = 61.0
        assert [d.id for d in (*kept.all("a"), *kept.all("b"))] == ["d5"]
        with pytest.raises(Refusal, match="no such draft"):
            kept.get("d1", "b")
        for number in (6, 7, 8):
            kept.keep(draft(number, family="f", now=now))
        with pytest.raises(Refusal, match="--max-drafts=3") as refused:
            kept.keep(draft(9, family="f", now=now))
        assert refused.value.status_code == 507

    asyncio.run(run())


def test_memory_of_drafts_is_given_back_though_nobody_asks() -> None:
    async def run() -> None:
        kept = KeptDrafts(ServerConfig(draft_minutes=0.01))
        one = draft(1, now=kept.now())
        kept.keep(Draft(**{**one.__dict__, "expires_at": kept.now() + 0.05}))
        assert kept.num_bytes
        await asyncio.sleep(0.4)
        assert kept._drafts == {}

    asyncio.run(run())
