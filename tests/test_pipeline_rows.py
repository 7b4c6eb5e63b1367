"""Rows that take turns on a stage: each keeps its own state, and one that fails or goes astray holds up nobody."""

from __future__ import annotations

import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from denoised.errors import EngineError
from denoised.features.pipeline import Stages, apply
from denoised.steps.tally import counted
from tests.pipeline_toy import SPEC, InPlace, equal, toy, toy_calls, turns
from tests.ranks import run_on_ranks


def astray(rank: int, _: int) -> dict[str, Any]:
    """Rows that turn elsewhere than their signature did, fail, or pass by, among rows that do not."""
    whole, model = toy(), toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    known, calls = toy_calls(whole), toy_calls(model)
    stages.run_many(calls)
    strengths = (1.0, 0.0, 0.5, 0.0, 2.0)
    rows = [functools.partial(calls[n % 3], strength=s) for n, s in enumerate(strengths)]
    fails = functools.partial(calls[3], fail=True)
    with counted() as counts:
        first = stages.run_many([calls[3], fails, *rows, lambda: 5], return_exceptions=True)
        second = stages.run_many([calls[3], fails, *rows], return_exceptions=True)
    expected = [known[3](), None, *(known[n % 3](strength=s) for n, s in enumerate(strengths))]
    return {
        "scouted": counts["pipeline_scouted"],
        "errors": [type(output[1]).__name__ for output in (first, second)],
        "none": first.pop(),
        "equal": [equal(a, b) for out in (first, second) for a, b in zip(out, expected, strict=True) if b is not None],
    }


def test_rows_that_go_astray_or_fail_hold_up_nobody() -> None:
    for stage in run_on_ranks(astray, 2) + run_on_ranks(astray, 3):
        assert stage["equal"] == [True] * 12
        assert stage["errors"] == ["ValueError"] * 2
        assert stage["none"] == 5
        assert stage["scouted"] > 2


def surroundings(rank: int, _: int) -> dict[str, Any]:
    """Rows under states of their own, which stay with them while they pause."""
    whole, model = toy(), toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    seen: list[list[str]] = [[], [], [], []]

    def row(number: int, call: Callable[[], Any]) -> Any:
        half = torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 1)
        with half, Heard(seen[number]), torch.set_grad_enabled(number > 1):
            assert label.get() == "ours"
            label.set(str(number))
            output = call()
            assert label.get() == str(number)
            assert torch.is_grad_enabled() == (number > 1)
            assert torch.is_autocast_enabled("cpu") == (number % 2 == 1)
        return output

    def rows(of: nn.Module) -> list[Callable[[], Any]]:
        return [functools.partial(row, number, call) for number, call in enumerate(toy_calls(of))]

    label.set("ours")
    stages.run_many(rows(model))
    expected = []
    for number in range(4):
        expected.append(contextvars.copy_context().run(rows(whole)[number]))
    alone = [list(names) for names in seen]
    for names in seen:
        names.clear()
    with torch.no_grad():
        together = stages.run_many(rows(model))
    return {
        "equal": list(map(equal, together, expected)),
        "heard": [len(names) for names in seen],
        "alone": [len(names) for names in alone],
        "turns": turns(stages),
        "outside": (label.get(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
    }


class Heard(TorchFunctionMode):
    """Keeps the names of functions that are called within it."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.linear, torch.tanh, torch.Tensor.tanh, torch.Tensor.sin):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


label: contextvars.ContextVar[str] = contextvars.ContextVar("label", default="")


def test_what_torch_keeps_of_a_thread_stays_with_its_row() -> None:
    for stage in run_on_ranks(surroundings, 2):
        assert stage["equal"] == [True] * 4
        assert len(stage["turns"]) > 4
        assert len(set(stage["heard"])) == 1  # each row heard its own functions, and as many as the others
        assert stage["heard"][0] > 0
        assert stage["outside"] == ("ours", False, True)


def failing(rank: int, _: int) -> dict[str, Any]:
    """A block of stage 1 fails in a forward of a known shape; then glue fails; then a block at its first sight."""
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    calls = toy_calls(model)
    good = stages.run_many(calls)[:2]
    with broken(model, stages, rank == 1):
        known = stages.run_many([*calls[:2], *calls], return_exceptions=True)
    again = stages.run_many(calls[:2])
    x, context = calls[3].args
    glue = stages.run_many(
        [calls[3], functools.partial(model, x, context, fail=True), calls[3]], return_exceptions=True
    )
    changing = toy(last=InPlace)
    apply(changing, SPEC, dist.group.WORLD)
    return {
        "known": known,
        "again": [equal(a, b) for a, b in zip(again, good, strict=True)],
        "glue": [type(glue[1]).__name__, equal(glue[0], glue[2])],
        "changing": caught(toy_calls(changing)[0]),
    }


@contextmanager
def broken(model: nn.Module, stages: Stages, here: bool) -> Iterator[None]:
    """On this stage, the first block fails at the second row."""

    def fail(*_: Any) -> None:
        if next(turn) == 1:
            raise MemoryError("no room")

    turn = itertools.count()
    part = next(model.get_submodule(stages.blocks[0]).children())
    hook = part.register_forward_pre_hook(fail if here else lambda *_: None)
    yield
    hook.remove()


def caught(call: Callable[[], Any]) -> str:
    try:
        call()
    except EngineError as error:
        return str(error)
    return ""


def test_errors_leave_nobody_waiting() -> None:
    first, second = run_on_ranks(failing, 2)
    assert [type(output).__name__ for output in second["known"]].count("MemoryError") == 1
    assert not any(isinstance(output, Exception) for output in first["known"])
    for stage in (first, second):
        assert stage["again"] == [True, True]
        assert stage["glue"] == ["ValueError", True]
        assert "changes its input in place" in stage["changing"]
