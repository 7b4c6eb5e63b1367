"""Where the engine cuts a denoiser into stages: by what its blocks compute, and not by their weights."""

from __future__ import annotations

import torch
from torch import nn

from denoised.features.pipeline.cut import blocks_of, deal, num_weights
from denoised.runtime.planning import work
from denoised.runtime.planning.facts import Tokens
from denoised.runtime.planning.reading import block_costs
from denoised.spec.model_spec import ModelSpec
from denoised.spec.registry import resolve
from tests.contract.parallel import check, counts, run
from tests.tiny import ROWS

# Its blocks have equal weights, but some read the prompt alone and some the picture too.
UNEVEN = "z_image"


def test_blocks_are_dealt_by_operations() -> None:
    pipeline = ROWS[UNEVEN].build()
    spec = resolve(pipeline)
    (costs,) = block_costs(pipeline, spec).values()
    blocks = blocks_of(pipeline.transformer, spec, 2).values()
    by_operations, by_weights = deal(costs, 2), deal(tuple(num_weights(block) for block in blocks), 2)
    outputs = run(UNEVEN, [0, 1], pipeline_parallel_size=2)
    check(UNEVEN, outputs, [0, 1], ["pipeline"])
    ran = [counted["blocks_run"] for counted in counts(outputs)]
    assert ran[0] * by_operations.count(1) == ran[1] * by_operations.count(0) > 0
    assert by_operations.count(0) != by_weights.count(0), "or this test tells nothing"


def test_blocks_of_unknown_operations_are_dealt_by_weights() -> None:
    """A model of somebody's own starts, whatever it is made of."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ParameterList([torch.zeros(size)]) for size in (4, 2, 2)])
    found = work.denoiser("transformer", model, Tokens(image=16, text=4, once=1, audio=0), ModelSpec(pipeline="Own"))
    assert found.costs == (4.0, 2.0, 2.0)
    assert block_costs(object(), ModelSpec(pipeline="Own")) == {}, "and so does one that cannot be read at all"
