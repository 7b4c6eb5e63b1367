"""What shapes do not tell: rows along another dim or in another argument, calls that are given a store to fill, and
what a prediction will look like."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from denoised.features.guidance import Guidance
from denoised.steps import outline, rows
from denoised.steps.ambient import Ambient
from denoised.steps.dealing import Placement
from denoised.steps.deferred import Deferred, Source, plain
from denoised.steps.forward import Call, Stage, Target
from denoised.steps.rows import Piece, RowRules
from denoised.steps.task import Task

LAYERED = RowRules(dims={"layers": 1})


def stacked(hidden: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """`layers` is [layers, rows, width], and there are as many layers as rows."""
    assert layers.shape[1] == hidden.shape[0]
    return hidden + layers.sum(dim=0)


def target(function: Any, **more: Any) -> Target:
    return Target(name="transformer", method="forward", stage=Stage.DENOISE, function=function, **more)


def call(task_id: str, to: Target, **kwargs: Any) -> Call:
    source = Source(lambda: None)
    return Call(task_id=task_id, target=to, args=(), kwargs=kwargs, branch=0, ambient=Ambient.capture(), source=source)


def layered(task_id: str, seed: int, batch: int = 2) -> Call:
    g = torch.Generator().manual_seed(seed)
    hidden, layers = torch.randn(batch, 3, generator=g), torch.randn(2, batch, 3, generator=g)
    return call(task_id, target(stacked), hidden=hidden, layers=layers)


def test_rows_along_another_dim_are_split() -> None:
    whole = layered("a", 0)
    pieces = [Piece(call=whole, rows=(row,), batch=2) for row in range(2)]
    outputs = [rows.run([piece], LAYERED)[0] for piece in pieces]
    assert [tuple(output.shape) for output in outputs] == [(1, 3), (1, 3)]
    assert torch.equal(rows.assemble(pieces, outputs), whole.run())


def test_rows_along_another_dim_are_joined() -> None:
    calls = [layered("a", 0), layered("b", 1, batch=1)]
    assert rows.signature(calls[0], LAYERED) == rows.signature(calls[1], LAYERED)
    assert rows.shares_tensors(calls[0], calls[1], LAYERED)
    pieces = [Piece(call=c, rows=tuple(range(rows.batch_size(c))), batch=rows.batch_size(c)) for c in calls]
    for c, output in zip(calls, rows.run(pieces, LAYERED), strict=True):
        assert torch.equal(output, c.run())


def test_rows_are_counted_where_the_target_says() -> None:
    def packed(tokens: torch.Tensor, pictures: list[torch.Tensor]) -> torch.Tensor:
        return pictures[0] + tokens.sum()

    arguments = {"tokens": torch.ones(7), "pictures": [torch.ones(1, 4)]}
    assert rows.batch_size(call("a", target(packed), **arguments)) == 7
    one = call("a", target(packed, rows_in="pictures"), **arguments)
    assert rows.batch_size(one) == 1
    assert rows.cost(one) == 4


class Store:
    """What a pipeline hands from call to call; the forward fills it."""

    def __init__(self) -> None:
        self.mode: str | None = None
        self.kept: list[torch.Tensor] = []


def remember(hidden: torch.Tensor, store: Store) -> torch.Tensor:
    if store.mode == "write":
        store.kept.append(hidden)
    return hidden + sum(store.kept) if store.mode == "read" else hidden


STORING = target(remember, stores=frozenset({"store"}))


def test_a_store_that_is_out_of_use_keeps_no_rows_apart() -> None:
    a, b = (call(name, STORING, hidden=torch.ones(1, 2), store=Store()) for name in "ab")
    assert not a.stateful
    assert rows.signature(a, RowRules()) == rows.signature(b, RowRules())
    undeclared = [call(name, target(remember), hidden=torch.ones(1, 2), store=Store()) for name in "ab"]
    assert all(c.stateful for c in undeclared)
    assert rows.signature(undeclared[0], RowRules()) != rows.signature(undeclared[1], RowRules())


def test_calls_with_a_store_in_use_stay_on_the_first_rank() -> None:
    store = Store()
    store.mode = "write"
    placement = Placement(num_ranks=2)
    homes = []
    for branch in range(3):
        made = call("a", STORING, hidden=torch.ones(2, 2), store=store)
        made.branch = branch
        ((home, piece),) = placement.deal([made], lambda _: True)
        homes.append(home)
        assert piece.is_whole
    assert len(set(homes)) == 1
    assert placement.deal([layered("b", 0)], lambda _: True)[0][0] != homes[0], "others take the free rank"


def test_a_store_is_read_as_it_was_when_the_call_was_made() -> None:
    """Put off, both calls would see the last mode."""

    def program() -> Any:
        store = Store()
        store.mode = "write"
        task.trap(STORING, (), {"hidden": torch.full((1, 2), 5.0), "store": store})
        store.mode = "read"
        guided = task.trap(STORING, (), {"hidden": torch.ones(1, 2), "store": store})
        store.mode = "skip"
        return guided, task.trap(STORING, (), {"hidden": torch.ones(1, 2), "store": store})

    task = Task("a", program, seed=0)
    guidance = Guidance(rules=lambda _: RowRules(), num_ranks=1, rank=0, join=False, max_rows=4)
    while not task.done:
        task.advance()
        calls, task.pending = list(task.pending), []
        outcome = guidance.run(calls)
        for made, value in guidance.finish(calls, outcome, outcome.outputs).items():
            made.source.resolve(value)
    assert task.error is None
    assert [v.tolist() for v in task.value] == [[[6.0, 6.0]], [[1.0, 1.0]]]


def waiting(output: Any, like: Any) -> tuple[Deferred, list[int]]:
    """The Deferred of a call that gives `output`, where an earlier one gave `like`; how often it was waited for."""
    waits: list[int] = []

    def wait() -> None:
        waits.append(1)
        source.resolve(output)

    source = Source(wait, outline.of_output(like))
    return Deferred.of(source), waits


def test_none_dtype_and_device_of_a_part_are_known_before_it_is() -> None:
    output = ([torch.ones(2)], None, torch.zeros(1))
    prediction, waits = waiting(output, like=output)
    pictures, sound, action = prediction
    assert sound is None
    assert pictures[0].dtype is torch.float32
    assert action.device.type == "cpu"
    masked = pictures[0] * torch.ones(2, dtype=pictures[0].dtype)
    assert not waits
    assert plain(masked).tolist() == [1.0, 1.0]
    assert len(waits) == 1


def test_a_prediction_of_another_dtype_than_was_told_is_an_error() -> None:
    (prediction,), _ = waiting((torch.ones(2, dtype=torch.float64),), like=(torch.ones(2),))
    assert prediction.dtype is torch.float32
    with pytest.raises(RuntimeError, match="another dtype than the one before"):
        plain(prediction)


def test_only_what_all_calls_agree_on_is_told() -> None:
    one, other = (torch.ones(1), [torch.ones(1)]), (torch.ones(1, dtype=torch.float64), [torch.ones(1)] * 2)
    both = outline.agreed(outline.of_output(one), outline.of_output(other))
    assert both is not None
    assert both.parts is not None
    assert both.parts[0] == outline.Outline(device=torch.device("cpu"))
    assert both.parts[1] == outline.Outline(item=outline.Outline(dtype=torch.float32, device=torch.device("cpu")))
    longer = outline.agreed(both, outline.of_output((*one, None)))
    assert longer is not None
    assert longer.parts is None


@given(st.lists(st.tuples(st.integers(1, 2), st.sampled_from([None, [1], [2]])), min_size=1, max_size=6), st.randoms())
def test_ranks_that_gather_together_run_the_same_blocks_at_the_same_time(
    given_calls: list[tuple[int, list[int] | None]], chance: Random
) -> None:
    """Whatever the calls, and wherever they go: forwards that leave blocks out meet only their like."""
    rules, ran = RowRules(shared=frozenset({"skip_layers"})), list[list[Any]]()
    prices = [chance.random() for _ in given_calls]
    for rank in range(2):
        sequence: list[Any] = []

        def forward(hidden: Tensor, *, skip_layers: Any, sequence: list[Any] = sequence) -> Tensor:
            sequence.append(skip_layers)
            return hidden

        target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=forward)
        calls = [
            Call(
                task_id=str(number),
                target=target,
                args=(torch.zeros(batch, 6),),
                kwargs={"skip_layers": left_out},
                branch=0,
                ambient=Ambient.capture(),
                source=Source(lambda: None),
            )
            for number, (batch, left_out) in enumerate(given_calls)
        ]
        guidance = Guidance(
            rules=lambda _: rules, num_ranks=2, rank=rank, join=True, max_rows=16, sticky=False, lockstep=True
        )
        outcome = guidance.run(calls, dict(zip(calls, prices, strict=True)).__getitem__)
        assert not outcome.errors
        ran.append(sequence)
    assert ran[0] == ran[1]
