"""Replicas of an engine: real processes on the tiny Qwen-Image, against the plain pipeline; and the rule that deals
requests to them, by itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoised import DiffusionParallelConfig, LoRARequest, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.config import EngineConfig
from denoised.errors import InvalidRequestError
from denoised.outputs import Progress
from denoised.request import Request
from denoised.runtime import launch
from denoised.runtime.cost import USUAL_STEPS, Cost, predict, shape_of
from denoised.runtime.model_info import ModelInfo, describe
from denoised.runtime.scheduler import Scheduler
from denoised.spec.registry import resolve
from tests.contract import test_lora
from tests.contract.support import (
    REORDERED,
    _pipeline,
    as_omni,
    difference,
    folder,
    media,
    plain,
    reference,
    request_of,
    seed_of,
)
from tests.tiny import ROWS

NAME = "qwen_image"
LONG = 30  # steps: more than anything else does meanwhile

# A plugin of ranks, which do as the file says when they start: "wait" for another word, or "die".
GATE = """
import os, pathlib, time
word = pathlib.Path({path!r})
while word.read_text() == "wait":
    time.sleep(0.02)
if word.read_text() == "die":
    os._exit(9)
"""


class Asked:
    """Requests in flight and what came of them."""

    def __init__(self, omni: Omni) -> None:
        self.omni, self.outputs, self.steps = omni, {}, {}
        self._changed = threading.Condition()

    def __call__(self, event: Progress | OmniRequestOutput) -> None:
        with self._changed:
            if isinstance(event, OmniRequestOutput):
                assert event.request_id not in self.outputs, "one output a request"
                self.outputs[event.request_id] = event
            else:
                self.steps[event.request_id] = event.step
            self._changed.notify_all()

    def ask(self, request_id: str, index: int, **more: Any) -> None:
        prompt, params = as_omni(request_of(NAME, index) | more, seed_of(index), "latent")
        self.omni._client.submit(self.omni._request(request_id, prompt, params), self)

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=100), (self.outputs.keys(), self.steps)

    def until_ended(self, *request_ids: str) -> None:
        self.until(lambda: set(request_ids) <= self.outputs.keys())

    def replica(self, request_id: str) -> int:
        return self.outputs[request_id].receipt.replica

    def restarts(self, request_id: str) -> int:
        return self.outputs[request_id].receipt.restarts

    def is_right(self, request_id: str, index: int) -> None:
        assert difference(reference(NAME, index, "latent"), media(self.outputs[request_id])) == 0, request_id


def replicas(count: int, **settings: Any) -> Omni:
    plugins = ("tests.contract.rank_setup", *settings.pop("plugins", ()))
    parallel = DiffusionParallelConfig(data_parallel_size=count, cfg_parallel_size=settings.pop("cfg", 1))
    return Omni(folder(NAME), parallel_config=parallel, num_threads=1, deterministic=True, plugins=plugins, **settings)


@pytest.fixture(scope="module")
def two() -> Iterator[Omni]:
    with replicas(2) as omni:
        pids = omni.rank_pids
        assert len(set(pids)) == 2
        yield omni
    assert_gone(pids)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_requests_of_all_sizes_equal_the_plain_pipeline_and_both_replicas_work(two: Omni) -> None:
    asked = Asked(two)
    names = [str(number) for number in range(8)]
    for name in names:
        asked.ask(name, int(name) % 3)
    asked.until_ended(*names)
    for name in names:
        asked.is_right(name, int(name) % 3)
    assert {asked.replica(name) for name in names} == {0, 1}
    for name in names:  # its forwards ran in one replica alone: 2 branches, each step
        steps = request_of(NAME, int(name) % 3)["num_inference_steps"]
        assert [work.forwards for work in asked.outputs[name].receipt.ranks] == [2 * steps]
        assert asked.restarts(name) == 0


def test_light_requests_go_where_the_heavy_one_is_not(two: Omni) -> None:
    asked, light = Asked(two), [f"light-{number}" for number in range(6)]
    asked.ask("heavy", 0, num_inference_steps=LONG)
    for name in light:
        asked.ask(name, 1)
    asked.until_ended("heavy", *light)
    assert {asked.replica(name) for name in light} == {1 - asked.replica("heavy")}
    for name in light:
        asked.is_right(name, 1)
    alone = plain(NAME, request_of(NAME, 0) | {"num_inference_steps": LONG}, seed_of(0), "latent")
    assert difference(alone, media(asked.outputs["heavy"])) == 0


def test_abort_reaches_the_right_replica(two: Omni) -> None:
    """The word `aborted` comes from the ranks that run the request: from others it would never come."""
    asked, long = Asked(two), [f"long-{number}" for number in range(4)]
    for name in long:
        asked.ask(name, 0, num_inference_steps=10 * LONG)
    asked.until(lambda: len(asked.steps) == 4)
    tokens, branches = (64 // two.info.size_multiple) ** 2, 2
    assert sum(two._client._scheduler.loads()) <= tokens * branches * 4 * (10 * LONG - 1), "steps that are done count"
    for name in long:
        two.abort(name)
        asked.until_ended(name)
        assert asked.outputs[name].error == "aborted"
        assert asked.steps[name] < 10 * LONG
    for number in range(4):
        asked.ask(f"after-{number}", 2)
    asked.until_ended(*(f"after-{number}" for number in range(4)))
    assert {asked.replica(f"after-{number}") for number in range(4)} == {0, 1}
    assert two._client._scheduler.loads() == [0, 0]


def test_adapters_are_loaded_into_every_replica_and_leave_all(two: Omni, tmp_path: Path) -> None:
    """By name; one that fits none of them is refused and is in none of their memories."""

    def held() -> list[int]:
        return [replica.loras for replica in two.stats().replicas]

    assert held() == [0, 0]
    two.load_lora(LoRARequest("ink", lora_path=test_lora.adapter(NAME, 1)[0], scale=test_lora.SCALE))
    assert held() == [1, 1]
    asked, names = Asked(two), [str(number) for number in range(4)]
    for name in names:
        asked.ask(name, 0, lora_request="ink")
    asked.until_ended(*names)
    assert {asked.replica(name) for name in names} == {0, 1}
    for name in names:
        assert difference(test_lora.reference(NAME, 0, 1), media(asked.outputs[name])) <= REORDERED
        assert asked.outputs[name].receipt.ranks[0].counts["lora_layers"] > 0
    with pytest.raises(InvalidRequestError, match="none of its layers"):
        two.load_lora(LoRARequest("other", lora_path=test_lora.adapter("sdxl", 1)[0]))
    assert held() == [1, 1]
    assert two.loras == ["ink"]
    two.unload_lora("ink")
    assert held() == [0, 0]


def test_every_replica_writes_its_trace(two: Omni, tmp_path: Path) -> None:
    asked = Asked(two)
    two.start_profile()
    asked.ask("a", 1)
    asked.until_ended("a")
    files = two.stop_profile(str(tmp_path))
    assert sorted(Path(file).parent.name for file in files) == ["replica-0", "replica-1"]
    assert all(Path(file).stat().st_size for file in files)


def test_replica_that_dies_starts_again_alone_while_the_other_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle. Its ranks are kept from starting until the other replica has done all its requests."""
    word = gate(tmp_path, monkeypatch, "gate_of_restarts")
    with replicas(2, plugins=("gate_of_restarts",)) as omni:
        asked, before = Asked(omni), omni._client.replica_pids
        for number in range(4):
            asked.ask(str(number), number % 3, num_inference_steps=LONG)
        asked.until(lambda: len(asked.steps) == 4)
        victim = omni._client._scheduler.replica_of("0")
        there = [str(n) for n in range(4) if omni._client._scheduler.replica_of(str(n)) == victim]
        other = [str(n) for n in range(4) if str(n) not in there]
        word.write_text("wait")
        os.kill(before[victim][0], signal.SIGKILL)
        asked.until_ended(*other)
        asked.ask("late", 2)
        asked.until_ended("late")
        assert not asked.outputs.keys() & set(there), "what was in flight waits for its own replica"
        word.write_text("")
        asked.until_ended(*there)
        assert [asked.restarts(name) for name in [*other, "late"]] == [0] * (len(other) + 1)
        assert [asked.restarts(name) for name in there] == [1] * len(there)
        assert {asked.replica(name) for name in there} == {victim}
        assert omni.restarts == 1
        after = omni._client.replica_pids
        assert after[1 - victim] == before[1 - victim]
        assert after[victim] != before[victim]
    for number in range(4):
        longer = request_of(NAME, number % 3) | {"num_inference_steps": LONG}
        expected = plain(NAME, longer, seed_of(number % 3), "latent")
        assert difference(expected, media(asked.outputs[str(number)])) == 0
    asked.is_right("late", 2)
    assert_gone([pid for pids in before + after for pid in pids])


def test_replica_that_cannot_start_again_leaves_its_requests_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = gate(tmp_path, monkeypatch, "gate_of_the_dead")
    with replicas(2, plugins=("gate_of_the_dead",)) as omni:
        asked, pids = Asked(omni), omni._client.replica_pids
        for name in "ab":
            asked.ask(name, 2, num_inference_steps=LONG)
        asked.until(lambda: len(asked.steps) == 2)
        first = omni._client._scheduler.replica_of("a")
        word.write_text("die")
        os.kill(pids[first][0], signal.SIGKILL)
        asked.until_ended("a", "b")
        assert {asked.replica("a"), asked.replica("b")} == {1 - first}
        assert (asked.restarts("a"), asked.restarts("b")) == (1, 0)
        asked.ask("c", 1)
        asked.until_ended("c")
        asked.is_right("c", 1)
        asked.ask("d", 0, num_inference_steps=10 * LONG)
        asked.until(lambda: "d" in asked.steps)
        os.kill(pids[1 - first][0], signal.SIGKILL)
        asked.until_ended("d")
        assert "cannot run any more" in asked.outputs["d"].error
        asked.ask("e", 0)
        asked.until_ended("e")
        assert "cannot run any more" in asked.outputs["e"].error


def gate(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> Path:
    word = folder / "word"
    word.write_text("")
    (folder / f"{module}.py").write_text(GATE.format(path=str(word)))
    monkeypatch.syspath_prepend(folder)
    return word


def test_two_replicas_of_two_ranks() -> None:
    with replicas(2, cfg=2) as omni:
        pids = omni.rank_pids
        assert len(set(pids)) == 4
        assert all(alive(pid) for pid in pids)
        asked, names = Asked(omni), [str(number) for number in range(6)]
        for name in names:
            asked.ask(name, int(name) % 3)
        asked.until_ended(*names)
        for name in names:
            asked.is_right(name, int(name) % 3)
            steps = request_of(NAME, int(name) % 3)["num_inference_steps"]
            receipt = asked.outputs[name].receipt
            assert sum(work.forwards for work in receipt.ranks) == 2 * steps, "of the two ranks of its replica"
        assert {asked.replica(name) for name in names} == {0, 1}
        asked.ask("open", 0, num_inference_steps=100 * LONG)
        asked.until(lambda: "open" in asked.steps)
    assert "closed before" in asked.outputs["open"].error
    assert_gone(pids)


# ---- pure Python: places, costs, dealing


def test_replicas_take_one_device_after_another_and_share_the_cores() -> None:
    config = EngineConfig(parallel_config=DiffusionParallelConfig(cfg_parallel_size=2))
    specs = [spec for replica in range(3) for spec in launch.rank_specs(config, "file://x", replica, 3)]
    assert [spec.rank for spec in specs] == [0, 1] * 3
    assert [spec.local_rank for spec in specs] == list(range(6))
    assert {(spec.world_size, spec.local_world_size) for spec in specs} == {(2, 6)}


def info(*parameters: str, **more: Any) -> ModelInfo:
    sizes = {"size_multiple": 16, "frame_multiple": 4, "branching_config": frozenset(), "kind": "image"}
    names = {"model": "m", "pipeline": "P", "device": "cpu", "dtype": "float32"}
    return ModelInfo(parameters=frozenset(parameters), **{**sizes, **names, **more})


def cost(of: ModelInfo, prompt: Any = None, **params: Any) -> Cost:
    sampling = OmniDiffusionSamplingParams(**params)
    return predict(Request(request_id="a", prompt=prompt or {}, params=sampling, seed=0), of)


def test_cost_is_tokens_times_branches_times_steps() -> None:
    size = {"height": 64, "width": 32}
    assert cost(info(), **size, num_inference_steps=5) == Cost(per_step=8, steps=5)
    assert cost(info(), **size, num_outputs_per_prompt=3) == Cost(per_step=24, steps=USUAL_STEPS)
    assert cost(info(), **size, sigmas=[1.0, 0.5]).total == 16
    assert cost(info(kind="video"), **size, num_frames=9).per_step == 8 * 3
    assert cost(info()).per_step == 64 * 64


@pytest.mark.parametrize(
    ("parameters", "prompt", "params", "branches"),
    [
        ("true_cfg_scale negative_prompt guidance_scale", {"negative_prompt": "x"}, {"true_cfg_scale": 4.0}, 2),
        ("true_cfg_scale negative_prompt guidance_scale", {"negative_prompt": "x"}, {"true_cfg_scale": 1.0}, 1),
        ("true_cfg_scale negative_prompt guidance_scale", {}, {"true_cfg_scale": 4.0, "guidance_scale": 4.0}, 1),
        ("negative_prompt guidance_scale", {}, {"guidance_scale": 4.0}, 2),
        ("negative_prompt guidance_scale", {}, {"guidance_scale": 1.0}, 1),
        ("negative_prompt guidance_scale", {}, {}, 2),
        ("guidance_scale", {}, {"guidance_scale": 4.0}, 1),  # distilled: an input of the model
    ],
)
def test_cost_counts_guidance_where_it_acts(parameters: str, prompt: Any, params: Any, branches: int) -> None:
    assert cost(info(*parameters.split()), prompt, height=16, width=16, **params).per_step == branches


def test_cost_has_the_branches_that_the_model_really_computes() -> None:
    """Four of LTX-2 and three of Stable Diffusion 3.5, by what their pipelines do; and by each scale that turns one
    off. The next request goes to the other replica, which has less to do."""
    for name in ("ltx2", "sd3_skip_layer"):
        pipeline = _pipeline(folder(name))
        of = describe(pipeline, resolve(pipeline), model=name, device="cpu", dtype="float32", defaults={})
        counts = {}
        for kind, unguided in (("whole", False), ("plain", True)):
            prompt, params = as_omni(request_of(name, 0, unguided), 0, "latent")
            counts[kind] = shape_of(prompt, params, of).branches
        assert counts == {"whole": ROWS[name].branches, "plain": 1}
    prompt, params = as_omni(request_of("ltx2", 0), 0, "latent")
    pipeline = _pipeline(folder("ltx2"))
    of = describe(pipeline, resolve(pipeline), model="ltx2", device="cpu", dtype="float32", defaults={})
    one_off = replace(params, extra_args=params.extra_args | {"stg_scale": 0.0, "audio_stg_scale": 0.0})
    assert shape_of(prompt, one_off, of).branches == 3
    assert shape_of(prompt, OmniDiffusionSamplingParams(), of).branches == 4, "of the class's own defaults"
    size = {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 5}
    scales = [name for branch in of.branches for name in branch.parameters]
    two, four = [
        predict(Request(request_id="a", prompt=prompt, params=p, seed=0), of)
        for p in (
            OmniDiffusionSamplingParams(**size, extra_args=dict.fromkeys(scales, 0.0)),
            OmniDiffusionSamplingParams(**size),
        )
    ]
    scheduler = Scheduler(8, 2)
    for request_id, of_request in (("four", four), ("two", two), ("next", two), ("last", two)):
        scheduler.add(request_id, of_request)
        scheduler.admit()
    assert places(scheduler) == {"four": 0, "two": 1, "next": 1, "last": 0}


def places(scheduler: Scheduler) -> dict[str, int | None]:
    return {name: scheduler.replica_of(name) for name in scheduler.running}


def filled(costs: dict[str, float], replicas: int = 2, size: int = 8) -> Scheduler:
    scheduler = Scheduler(size, replicas)
    for name, total in costs.items():
        scheduler.add(name, Cost(per_step=total / 10, steps=10))
    scheduler.admit()
    return scheduler


def test_dealing_is_by_cost_and_not_by_count() -> None:
    scheduler = filled({"heavy": 100} | dict.fromkeys("abcdef", 10))
    assert places(scheduler) == {"heavy": 0} | dict.fromkeys("abcdef", 1)
    assert scheduler.loads() == [100, 60]


def test_work_that_is_done_weighs_no_more() -> None:
    scheduler = filled({"heavy": 100, "light": 20})
    scheduler.progress("heavy", 9, 10)
    scheduler.add("next", Cost(per_step=10, steps=1))
    scheduler.admit()
    assert scheduler.replica_of("next") == 0
    scheduler.progress("light", 1, 1000)  # it has more steps than anybody thought
    assert scheduler.loads() == [20, 2 * 999]


def test_a_request_waits_for_whichever_replica_has_room_first() -> None:
    scheduler = filled({"heavy": 100, "light": 1, "next": 5}, size=1)
    assert places(scheduler) == {"heavy": 0, "light": 1}
    scheduler.remove("heavy")
    assert scheduler.admit() == ["next"]
    assert scheduler.replica_of("next") == 0


def test_what_was_in_flight_waits_for_its_own_replica_and_holds_up_nobody() -> None:
    scheduler = filled({"a": 1, "b": 2, "c": 3}, size=1)
    assert scheduler.crashed(0) == (["a"], [])
    scheduler.pause(0)
    assert scheduler.admit() == []
    scheduler.remove("b")
    assert scheduler.admit() == ["c"]
    assert scheduler.replica_of("c") == 1
    scheduler.resume(0)
    assert scheduler.admit() == ["a"]
    assert scheduler.replica_of("a") == 0


def test_replica_that_is_given_up_leaves_its_requests_first_in_line() -> None:
    scheduler = filled({"a": 1, "b": 1, "c": 1, "d": 1}, size=1)
    scheduler.crashed(0)
    assert scheduler.abandon(0)
    scheduler.remove("b")
    assert scheduler.admit() == ["a"]
    assert scheduler.replica_of("a") == 1
    scheduler.crashed(1)
    assert not scheduler.abandon(1), "none is left"
    assert scheduler.num_waiting == 3


ACTIONS = st.tuples(
    st.sampled_from(["add", "end", "crash", "pause", "resume", "abandon"]), st.integers(0, 2), st.integers(1, 50)
)


@given(st.integers(1, 3), st.lists(ACTIONS, max_size=60))
def test_dealing_loses_nothing_and_leaves_no_replica_idle(size: int, actions: list[Any]) -> None:
    scheduler, known, gone = Scheduler(size, 3), set(), set()
    for number, (action, replica, weight) in enumerate(actions):
        if action == "add":
            scheduler.add(str(number), Cost(per_step=weight, steps=2))
            known.add(str(number))
        elif action == "end" and scheduler.running:
            known.discard(scheduler.running[0])
            scheduler.remove(scheduler.running[0])
        elif action in ("crash", "abandon"):
            known -= set(scheduler.crashed(replica)[1])
        if action == "abandon":
            gone.add(replica)
            scheduler.abandon(replica)
        elif action == "pause":
            scheduler.pause(replica)
        elif action == "resume" and replica not in gone:
            scheduler.resume(replica)
        scheduler.admit()
        at = [places(scheduler)[name] for name in scheduler.running]
        assert max(map(at.count, at), default=0) <= size
        assert len(scheduler.running) + scheduler.num_waiting == len(known)
        if scheduler._waiting and not scheduler._waiting[0].alone:
            idle = [lane for lane in scheduler._lanes if lane.open and not lane.running]
            assert not idle, "a request waits and a replica has nothing to do"
