"""Which stage gets which block, and what cannot be cut."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.features.pipeline import apply
from denoised.features.pipeline.cut import MAX_ROUNDS, blocks_of, deal
from denoised.features.pipeline.order import order, parts
from tests.pipeline_toy import SPEC, toy
from tests.ranks import run_on_ranks


def refused(rank: int, _: int) -> str:
    model = toy()
    del model.late, model.pairs[1:]
    try:
        apply(model, SPEC, dist.group.WORLD)
    except InvalidConfigError as error:
        return str(error)
    return ""


def test_more_stages_than_blocks_are_refused() -> None:
    expected = "pipeline_parallel_size=2 is more than the 1 blocks of Toy; use at most 1."
    assert run_on_ranks(refused, 2) == [expected] * 2
    with pytest.raises(InvalidConfigError, match="pipeline_parallel_size=9 is more than the 6 blocks of Toy; use at"):
        blocks_of(toy(), SPEC, 9)
    with pytest.raises(InvalidConfigError, match="Linear has no list of blocks to cut; use pipeline_parallel_size=1"):
        blocks_of(nn.Linear(2, 2), SPEC, 2)


def dearest(costs: list[float], stages: list[int]) -> float:
    return max(sum(c for c, s in zip(costs, stages, strict=True) if s == stage) for stage in set(stages))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_ranges_are_as_equal_as_can_be(num_stages: int) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        costs = torch.rand(8).tolist()
        stages = list(deal(tuple(costs), num_stages, max_rounds=1))
        assert stages == sorted(stages)
        assert set(stages) == set(range(num_stages))
        cuts = itertools.combinations(range(1, 8), num_stages - 1)
        every = ([sum(i >= c for c in cut) for i in range(8)] for cut in cuts)
        assert dearest(costs, stages) == pytest.approx(min(dearest(costs, other) for other in every))


@pytest.mark.parametrize("ratio", [1.0, 2.4])
@pytest.mark.parametrize("num_blocks", [12, 13, 28, 57, 60])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_take_turns_and_hold_equal_shares(num_blocks: int, num_stages: int, ratio: float) -> None:
    """Of blocks of one size, and of two, as many models have. Other than with one range a stage, few wait for few."""
    costs = tuple(ratio if index < num_blocks // 3 else 1.0 for index in range(num_blocks))
    stages = deal(costs, num_stages)
    rows = (parts(stages, costs),) * num_stages
    assert num_stages < len(rows[0]) <= MAX_ROUNDS * num_stages
    assert dearest(list(costs), list(stages)) <= sum(costs) / num_stages + max(costs)
    once = (parts(deal(costs, num_stages, max_rounds=1), costs),) * num_stages
    assert order(rows).seconds < 0.85 * order(once).seconds


@pytest.mark.parametrize(("blocks", "stages", "share"), [(12, 2, 12 / 13), (28, 2, 14 / 15), (60, 2, 15 / 16)])
def test_how_long_stages_are_busy(blocks: int, stages: int, share: float) -> None:
    """As many rows as stages: all but the first and the last turns overlap."""
    row = parts(deal((1.0,) * blocks, stages), (1.0,) * blocks)
    assert blocks / order((row,) * stages).seconds == pytest.approx(share)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 3])
def test_an_order_takes_as_long_as_it_must(rows: int, stages: int, rounds: int) -> None:
    row = parts(list(range(stages)) * rounds, [1.0] * stages * rounds)
    found = order((row,) * rows)
    assert found.seconds == rounds * max(rows, stages) + min(rows, stages) - 1
    assert sorted(found.turns) == [(r, p) for r in range(rows) for p in range(stages * rounds)]
    assert all(found.turns.index((r, p)) < found.turns.index((r, p + 1)) for r, p in found.turns if p + 1 < len(row))
