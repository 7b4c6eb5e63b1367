"""Splitting a call into rows, dealing, joining and putting together lose nothing."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from denoised.steps import rows
from denoised.steps.deferred import Source
from denoised.steps.forward import Ambient, Call, Stage, Target, running
from denoised.steps.rows import Piece, Placement, RowRules

RULES = RowRules(shared=frozenset({"ids"}), lists=frozenset({"captions"}))


def forward(hidden: Any, timestep: Any, *, ids: Any, captions: Any, extra: Any) -> Any:
    """Each row depends on its own arguments and on the shared ones only."""
    assert running(), "a forward knows which calls it serves"
    scale = torch.stack([c.sum() for c in captions])
    out = (hidden + extra["bias"]) * timestep[:, None] + ids.sum() + scale[:, None]
    return (out, [row.clone() for row in out])


def call(batch: int, task: str = "a", seed: int = 0, branch: int = 0) -> Call:
    g = torch.Generator().manual_seed(seed)
    return Call(
        task_id=task,
        target=Target(name="transformer", method="forward", stage=Stage.DENOISE, function=forward),
        args=(torch.randn(batch, 6, generator=g), torch.rand(batch, generator=g)),
        kwargs={
            "ids": torch.arange(batch),  # as long as the batch, and yet the same for all rows
            "captions": [torch.randn(batch, generator=g) for _ in range(batch)],
            "extra": {"bias": torch.randn(batch, 6, generator=g), "flag": None},
        },
        branch=branch,
        ambient=Ambient.capture(),
        source=Source(lambda: None),
    )


@given(st.integers(1, 6), st.integers(1, 4))
def test_split_over_ranks_and_put_together(batch: int, ranks: int) -> None:
    whole = call(batch)
    pieces = list(Placement(num_ranks=ranks).deal(whole, splittable=True).values())
    assert sorted(row for piece in pieces for row in piece.rows) == list(range(batch))
    assert max(len(p.rows) for p in pieces) - min(len(p.rows) for p in pieces) <= 1
    result = rows.assemble(pieces, [rows.run([piece], RULES)[0] for piece in pieces])
    expected = whole.run()
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(result[1], expected[1], strict=True))


def test_calls_of_one_signature_join() -> None:
    calls = [call(2, task, seed) for seed, task in enumerate("abc")]
    pieces = [Piece(call=c, rows=(0, 1), batch=2) for c in calls]
    assert len({rows.signature(c, RULES) for c in calls}) == 1
    assert rows.shares_tensors(calls[0], calls[1], RULES)
    for c, output in zip(calls, rows.run(pieces, RULES), strict=True):
        assert torch.equal(output[0], c.run()[0])


def test_group_joins_requests_and_never_one_request_alone() -> None:
    def group(calls: list[Call], most: int = 16) -> list[list[str]]:
        pieces = [Piece(call=c, rows=(0,), batch=1) for c in calls]
        return [[p.call.task_id for p in g] for g in rows.group(pieces, lambda _: RULES, lambda a, b: True, most)]

    guided = [call(1, "a", branch=0), call(1, "a", branch=1)]
    assert group(guided) == [["a"], ["a"]]
    assert group([*guided, call(1, "b")]) == [["a", "a", "b"]]
    assert group([call(1, t) for t in "abcd"], most=2) == [["a", "b"], ["c", "d"]]


def test_what_differs_is_not_joined() -> None:
    assert rows.signature(call(1), RULES) != rows.signature(call(2), RULES)
    other = call(2)
    other.kwargs["ids"] = torch.tensor([5, 6])
    assert not rows.shares_tensors(call(2), other, RULES)
    other.kwargs["extra"]["flag"] = True
    assert rows.signature(call(2), RULES) != rows.signature(other, RULES)


def test_rows_keep_their_rank_and_new_ones_go_where_there_is_least() -> None:
    placement = Placement(num_ranks=2)
    assert [placement.rank_of(call(1, "a", branch=b), 0) for b in (0, 1)] == [0, 1]
    assert placement.rank_of(call(1, "b"), 0) == 0
    assert placement.rank_of(call(1, "c"), 0) == 1
    assert [placement.rank_of(call(1, "a", branch=b), 0) for b in (0, 1)] == [0, 1]
    placement.release("a")
    placement.release("b")
    assert placement.rank_of(call(1, "d"), 0) == 0


def test_wrong_split_is_found_out() -> None:
    """A forward that mixes its rows: rules that nobody declared must not be trusted."""

    def mixing(hidden: Any, timestep: Any, **_: Any) -> Any:
        return (hidden - hidden.mean(0),)

    honest, mixed = call(2), call(2)
    mixed.target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=mixing)
    assert rows.agree([Piece(call=honest, rows=(r,), batch=2) for r in range(2)], RULES)
    assert not rows.agree([Piece(call=mixed, rows=(r,), batch=2) for r in range(2)], RULES)
