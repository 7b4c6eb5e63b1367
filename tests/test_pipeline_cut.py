"""Which stage gets which block, and what cannot be cut."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.features.pipeline import apply
from denoised.features.pipeline.cut import blocks_of, deal
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
        stages = deal(costs, num_stages)
        assert stages == sorted(stages)
        assert set(stages) == set(range(num_stages))
        cuts = itertools.combinations(range(1, 8), num_stages - 1)
        every = ([sum(i >= c for c in cut) for i in range(8)] for cut in cuts)
        assert dearest(costs, stages) == pytest.approx(min(dearest(costs, other) for other in every))
