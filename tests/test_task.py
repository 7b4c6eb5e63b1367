"""A task stops at every component call, runs it under its own thread state, and unwinds from wherever it stands."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput

from denoised.features.guidance import Guidance
from denoised.steps.deferred import Deferred
from denoised.steps.forward import Call, Stage, Target
from denoised.steps.rows import RowRules
from denoised.steps.task import Task
from denoised.steps.trap import stepped


def double(hidden: torch.Tensor, *, return_dict: bool = False) -> Any:
    return (hidden * 2,)


DENOISER = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=double)
ENCODER = Target(name="text_encoder", method="forward", stage=Stage.ENCODE, function=lambda x: x + 1)


def task_of(program: Callable[[Task], Any], *, seed: int = 0, **settings: Any) -> Task:
    """A task whose program is given the task, so that it can call traps."""
    box: list[Task] = []
    box.append(Task(f"t{seed}", lambda: program(box[0]), seed=seed, **settings))
    return box[0]


def resolve(task: Task, *, learn: bool = False) -> None:
    """What the engine does between two advances."""
    for call in list(task.pending):
        try:
            value = call.run() if call.target.stage is Stage.DENOISE else task.run_atomic(call)
        except Exception as error:
            call.source.fail(error)
        else:
            if learn:
                task.learn(call, value)
            call.source.resolve(value)
    task.pending.clear()


def run(task: Task, **settings: Any) -> Task:
    task.advance()
    while not task.done:
        resolve(task, **settings)
        task.advance()
    return task


def call(task: Task, target: Target = DENOISER, *args: Any, **kwargs: Any) -> Any:
    return task.trap(target, args or (torch.ones(1, 2),), kwargs)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("task-")]


@pytest.mark.parametrize(
    ("context", "seen"),
    [
        (contextlib.nullcontext, (True, False, False)),
        (torch.no_grad, (False, False, False)),
        (torch.inference_mode, (False, True, False)),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), (True, False, True)),
    ],
)
@pytest.mark.parametrize("stage", [Stage.ENCODE, Stage.DENOISE, Stage.DECODE])
def test_the_forward_runs_under_the_programs_thread_state(context: Any, seen: tuple[bool, ...], stage: Stage) -> None:
    def look(x: torch.Tensor) -> Any:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    def program(task: Task) -> Any:
        with context():
            return tuple(call(task, Target(name="part", method="forward", stage=stage, function=look)))

    assert run(task_of(program)).value == seen
    assert torch.is_grad_enabled(), "nothing of it stays on the engine's thread"
    assert not torch.is_inference_mode_enabled()


def test_what_is_recorded_under_autocast_is_computed_under_it() -> None:
    def program(task: Task) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(task)[0] @ torch.ones(2, 2)  # computed after the block

    assert run(task_of(program)).value.dtype == torch.bfloat16


def test_global_random_numbers_of_two_tasks_and_the_caller_do_not_mix() -> None:
    noise = Target(name="e", method="f", stage=Stage.ENCODE, function=lambda x: float(torch.rand(())))

    def draws(task: Task) -> list[float]:
        return [value for _ in range(3) for value in (float(torch.rand(())), call(task, noise))]

    def alone(seed: int) -> list[float]:
        return list(run(task_of(draws, seed=seed)).value)

    expected = [alone(1), alone(2)]
    torch.manual_seed(5)
    outside = [float(torch.rand(())) for _ in range(4)]
    torch.manual_seed(5)
    tasks, seen = [task_of(draws, seed=s) for s in (1, 2)], []
    for task in tasks:
        task.advance()
        seen.append(float(torch.rand(())))
    while not all(task.done for task in tasks):
        for task in tasks:
            if not task.done:
                resolve(task)
                task.advance()
    seen += [float(torch.rand(())) for _ in range(2)]
    assert [task.value for task in tasks] == expected
    assert expected[0] != expected[1]
    assert seen == outside, "the caller's own numbers go on as if no task had run"


@pytest.mark.parametrize("stops", range(5))
def test_cancel_at_every_suspension_point(stops: int) -> None:
    """Unwinds through `finally`, drops what it held, and does not go on even if the program calls then."""
    left: list[str] = []
    held: list[weakref.ref[Any]] = []

    def program(task: Task) -> Any:
        latents = torch.zeros(1000)
        held.append(weakref.ref(latents))
        try:
            for _ in range(2):
                call(task, ENCODER)
                with contextlib.suppress(Exception):  # pipelines that catch errors do not catch this
                    float(call(task)[0].sum())
            call(task, ENCODER)
        finally:
            left.append("finally")
            call(task, ENCODER)  # would wait for an engine that has given it up
            left.append("went on")
        return latents

    task = task_of(program)
    task.advance()
    for _ in range(stops):
        resolve(task)
        task.advance()
    assert not task.done
    task.cancel()
    assert task.done
    assert task.cancelled
    assert left == ["finally"]
    assert task.value is None
    assert not task.pending
    task._thread.join(timeout=5)
    assert held[0]() is None, "the latents of a cancelled program are released at once"
    task.cancel()  # again: nothing happens


def test_cancel_of_a_program_that_swallows_everything() -> None:
    def program(task: Task) -> str:
        for _ in range(3):
            with contextlib.suppress(BaseException):
                call(task, ENCODER)
        return "ended"

    task = task_of(program)
    task.advance()
    task.cancel()
    task._thread.join(timeout=5)
    assert task.done


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_exception_in_the_program_ends_it_and_holds_no_frames(kind: type[BaseException]) -> None:
    held: list[weakref.ref[Any]] = []

    def program(task: Task) -> None:
        latents = torch.zeros(1000)
        held.append(weakref.ref(latents))
        call(task, ENCODER)
        try:
            raise KeyError("first")
        except KeyError:
            raise kind("broken")  # noqa: B904

    gc.disable()
    try:
        task = run(task_of(program))
        assert isinstance(task.error, Exception)
        assert "broken" in str(task.error)
        task._thread.join(timeout=5)
        assert held[0]() is None, "an error must not hold the program's latents until the next garbage collection"
    finally:
        gc.enable()


def test_exception_in_a_call_reaches_the_program_where_it_looks() -> None:
    def fails(x: torch.Tensor) -> Any:
        raise ValueError("in the forward")

    def program(task: Task) -> str:
        for stage in Stage:
            with pytest.raises(ValueError, match="in the forward"):
                float(call(task, Target(name="part", method="forward", stage=stage, function=fails))[0].sum())
        return "went on"

    assert run(task_of(program)).value == "went on"


def test_a_call_that_cannot_be_made_raises_where_it_is_made() -> None:
    def program(task: Task) -> str:
        with pytest.raises(TypeError, match="no_such"):
            call(task, DENOISER, torch.ones(1, 2), no_such=1)
        return "went on"

    task = run(task_of(program))
    assert task.value == "went on"
    assert not task.pending


class Output(BaseOutput):  # type: ignore[misc]
    images: Any = None


class Plain:
    def __init__(self, images: Any) -> None:
        self.images = images


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: Output(images=x), Plain])
def test_a_program_may_return_what_it_never_looked_at(wrap: Callable[[Any], Any]) -> None:
    """One-step models return their prediction. It is computed before the task is done, never by whoever reads it."""
    value = run(task_of(lambda task: wrap(call(task)[0] + 1))).value
    value = getattr(value, "images", value)
    value = value[0] if isinstance(value, list | tuple) else value
    assert not isinstance(value, Deferred)
    assert value.tolist() == [[3.0, 3.0]]


def test_looking_from_another_thread_is_an_error_and_no_deadlock() -> None:
    errors: list[Exception] = []

    def program(task: Task) -> Any:
        prediction = call(task)[0]

        def look() -> None:
            try:
                float(prediction.sum())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(timeout=10)
        return prediction

    assert run(task_of(program)).value is not None
    assert "outside the pipeline call" in str(errors[0])


def test_unpacking_waits_no_more_once_the_number_of_outputs_is_known() -> None:
    def outputs(hidden: torch.Tensor, return_all: bool = False) -> Any:
        return (hidden, hidden + 1) if return_all else (hidden,)

    target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=outputs)
    arities: dict[str, int] = {}
    waits: list[int] = []

    def program(task: Task) -> Any:
        video, audio = call(task, target, torch.ones(1), return_all=True)
        waits.append(len(task.pending))
        (alone,) = call(task, target, torch.ones(1))  # as many as its own flags say
        return video, audio, alone

    for _ in range(2):
        assert len(run(task_of(program, arities=arities), learn=True).value) == 3
    assert waits == [0, 1], "the second time the call is still pending when it is unpacked"


def guidance(**settings: Any) -> Guidance:
    return Guidance(rules=lambda _: RowRules(), **{"num_ranks": 1, "rank": 0, "join": False, "max_rows": 4} | settings)


def test_argument_changed_in_place_before_it_is_computed_is_an_error() -> None:
    """The first branch must not see what the program wrote for the second."""

    def program(task: Task) -> Any:
        buffer = torch.ones(1, 2)
        first = call(task, DENOISER, buffer)[0]
        buffer.mul_(3)
        return first + call(task, DENOISER, buffer)[0]

    task = task_of(program)
    task.advance()
    calls: list[Call] = list(task.pending)
    assert len(calls) == 2
    outcome = guidance().run(calls)
    assert ["in place" in outcome.errors.get(piece.key, "") for _, piece in outcome.pieces] == [True, False]
    task.cancel()
    assert run(task_of(program, defer=False)).value.tolist() == [[8.0, 8.0]]


def test_inference_mode_leaves_nothing_for_later() -> None:
    """Inference tensors do not tell when they change, so each call is computed before the program goes on."""

    def program(task: Task) -> Any:
        with torch.inference_mode():
            buffer = torch.ones(1, 2)
            first = call(task, DENOISER, buffer)[0]
            buffer.mul_(3)
            return first + call(task, DENOISER, buffer)[0]

    assert run(task_of(program)).value.tolist() == [[8.0, 8.0]]


def test_a_scheduler_that_a_pipeline_makes_anew_still_tells_its_steps() -> None:
    branches: list[int] = []

    def program(task: Task) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.__class__ = stepped(type(scheduler))
        scheduler = scheduler.__class__.from_config(scheduler.config)
        scheduler.set_timesteps(2)
        latents = torch.ones(1, 2)
        for t in scheduler.timesteps:
            predictions = [call(task, DENOISER, latents)[0] for _ in range(2)]
            branches.extend(c.branch for c in task.pending)
            latents = scheduler.step(sum(predictions), t, latents, return_dict=False)[0]
        return latents

    assert torch.is_tensor(run(task_of(program)).value)
    assert branches == [0, 1, 0, 1]


def test_engines_of_one_process_take_turns_with_the_global_generator() -> None:
    noise = Target(name="e", method="f", stage=Stage.ENCODE, function=lambda x: float(torch.rand(20_000).sum()))

    def draws(task: Task) -> list[float]:
        return [value for _ in range(40) for value in (float(torch.rand(20_000).sum()), call(task, noise))]

    expected = [run(task_of(draws, seed=seed)).value for seed in range(3)]
    tasks = [task_of(draws, seed=seed) for seed in range(3)]
    engines = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join(timeout=60)
    assert [task.value for task in tasks] == expected
