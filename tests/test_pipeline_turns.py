"""Stages that take turns with rows: whatever the blocks of another stage need is sent, and little time is lost."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from denoised.features.pipeline import apply
from denoised.spec.model_spec import ModelSpec
from denoised.steps.tally import counted
from tests.pipeline_toy import SPEC, equal, toy, toy_calls
from tests.ranks import run_on_ranks


def toy_on_stages(rank: int, size: int, costs: list[float] | None) -> tuple[list[bool], list[bool], dict[str, int]]:
    expected = [call() for call in toy_calls(toy())]
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD, costs=costs, max_rounds=1 if costs else 8)
    calls = toy_calls(model)
    scouted = [equal(call(), output) for call, output in zip(calls, expected, strict=True)]
    with counted() as counts:
        together = stages.run_many(calls)
    return scouted, list(map(equal, together, expected)), dict(counts)


@pytest.mark.parametrize("cut", [(1, 5), (3, 3), (4, 2), (5, 1), (1, 1, 4), (2, 2, 2), (3, 2, 1)], ids=str)
def test_whatever_crosses_a_cut_is_sent(cut: tuple[int, ...]) -> None:
    """Cuts are forced by costs: blocks of a range cost what makes it as dear as the others."""
    costs = [1 / length for length in cut for _ in range(length)]
    for scouted, together, counts in run_on_ranks(toy_on_stages, len(cut), costs):
        assert scouted == together == [True] * 4
        assert counts["broadcast"] == 8  # two outputs of each row, and nothing else
        assert "pipeline_scouted" not in counts


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_that_take_turns_send_it_too(num_stages: int) -> None:
    """A row comes back to a stage, and its last block is on another than the last one."""
    for scouted, together, counts in run_on_ranks(toy_on_stages, num_stages, None):
        assert scouted == together == [True] * 4
        assert counts["broadcast"] == 8


def turned(rank: int, _: int) -> list[Any]:
    """Forwards of one signature that call other blocks, as a number decides; and what was found out anew for each."""
    whole, model = toy(), toy()
    apply(model, SPEC, dist.group.WORLD)
    found: list[Any] = []
    for strength in (1.0, 0.5, 0.0, 0.0, 2.0):
        with counted() as counts:
            output = toy_calls(model)[0](strength=strength)
        found.append((equal(output, toy_calls(whole)[0](strength=strength)), counts["pipeline_scouted"]))
    return found


def test_a_forward_that_takes_another_way_is_watched_again() -> None:
    assert run_on_ranks(turned, 2) == [[(True, 1), (True, 0), (True, 1), (True, 0), (True, 1)]] * 2


class Slow(nn.Module):
    """Twelve blocks that take their time without a processor, so that the clock tells of waiting alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Nap() for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda x, block: block(x), self.blocks, x)


class Nap(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return super().forward(x)


NAP = 0.08


def timed(rank: int, size: int, num_rows: int, max_rounds: int) -> tuple[float, float]:
    """How many times faster than one rank, at best of three, and the share of it that this stage waited."""
    torch.manual_seed(0)
    model = Slow().eval().requires_grad_(False)
    stages = apply(model, ModelSpec(pipeline="Slow"), dist.group.WORLD, max_rounds=max_rounds)
    calls = [functools.partial(model, torch.randn(1, 8)) for _ in range(num_rows)]
    found = []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        stages.run_many(calls)
        found.append((12 * NAP * num_rows / (time.perf_counter() - started), stages.bubble()))
    return max(found[1:])


@pytest.mark.parametrize(
    ("size", "num_rows", "max_rounds", "ideal"),
    [(2, 2, 8, 24 / 13), (2, 2, 1, 4 / 3), (2, 3, 8, 36 / 19), (3, 3, 8, 36 / 14), (2, 1, 8, 1.0)],
)
def test_ranks_are_as_many_times_faster(size: int, num_rows: int, max_rounds: int, ideal: float) -> None:
    """As many times as the order of turns allows: what one range a stage would give is less than four fifths of it."""
    for speed, bubble in run_on_ranks(timed, size, num_rows, max_rounds):
        assert 0.8 * ideal < speed <= ideal
        assert bubble == pytest.approx(1 - ideal / size, abs=0.15)
