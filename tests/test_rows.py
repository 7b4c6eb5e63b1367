"""Splitting a call into rows, dealing, joining and putting together lose nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from denoised.features.guidance import Guidance
from denoised.steps import rows
from denoised.steps.ambient import Ambient
from denoised.steps.dealing import Placement, group
from denoised.steps.deferred import Source
from denoised.steps.forward import Call, Stage, Target, running
from denoised.steps.rows import Piece, RowRules

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
    pieces = [piece for _, piece in Placement(num_ranks=ranks).deal([whole], lambda _: True)]
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
    def grouped(calls: list[Call], most: int = 16) -> list[list[str]]:
        pieces = [Piece(call=c, rows=(0,), batch=1) for c in calls]
        return [[p.call.task_id for p in g] for g in group(pieces, lambda _: RULES, lambda a, b: True, most)]

    guided = [call(1, "a", branch=0), call(1, "a", branch=1)]
    assert grouped(guided) == [["a"], ["a"]]
    assert grouped([*guided, call(1, "b")]) == [["a", "a", "b"]]
    assert grouped([call(1, t) for t in "abcd"], most=2) == [["a", "b"], ["c", "d"]]


def test_what_differs_is_not_joined() -> None:
    assert rows.signature(call(1), RULES) != rows.signature(call(2), RULES)
    other = call(2)
    other.kwargs["ids"] = torch.tensor([5, 6])
    assert not rows.shares_tensors(call(2), other, RULES)
    other.kwargs["extra"]["flag"] = True
    assert rows.signature(call(2), RULES) != rows.signature(other, RULES)


def test_rows_keep_their_rank_and_new_ones_go_where_there_is_least() -> None:
    placement = Placement(num_ranks=2)
    guided = [call(1, "a", branch=b) for b in (0, 1)]
    assert homes(placement, guided) == [0, 1]
    assert homes(placement, [call(1, "b")]) == [0]
    assert homes(placement, [call(1, "c")]) == [1]
    assert homes(placement, guided) == [0, 1]
    placement.release("a")
    placement.release("b")
    assert homes(placement, [call(1, "d")]) == [0]


def test_rows_that_may_move_are_dealt_anew_around_what_else_ranks_do() -> None:
    placement = Placement(num_ranks=2, sticky=False)
    calls, nothing = [call(1, "a", branch=b) for b in (0, 1)] + [call(1, "b"), call(1, "c")], lambda _: True
    price = {made: float(number + 1) for number, made in enumerate(calls)}.__getitem__
    assert [rank for rank, _ in placement.deal(calls, nothing, price)] == [0, 1, 1, 0], "4 and 1, 3 and 2"
    assert [rank for rank, _ in placement.deal(calls, nothing, price, (10.0, 0.0))] == [1, 1, 1, 1]
    assert [rank for rank, _ in placement.deal(calls, nothing, price)] == [1, 0, 0, 1], "4 stays where it was"
    assert [rank for rank, _ in placement.deal(calls, nothing, price, (0.0, 0.01))] == [1, 0, 0, 1], "as good as that"
    assert [rank for rank, _ in placement.deal(calls, nothing, price, (0.0, 4.0))] == [1, 1, 0, 0]
    assert placement.homes(calls[0]) == (None,)


def homes(placement: Placement, calls: list[Call], *, splittable: bool = True) -> list[int]:
    return [rank for rank, _ in placement.deal(calls, lambda _: splittable)]


def test_a_call_is_divided_only_if_it_is_more_than_a_fair_share() -> None:
    """Two branches of two images on two ranks: a branch each, two rows in one forward."""
    assert homes(Placement(num_ranks=2), [call(2, branch=0), call(2, branch=1)]) == [0, 1]
    assert homes(Placement(num_ranks=2), [call(2)]) == [0, 1]
    assert homes(Placement(num_ranks=2), [call(2)], splittable=False) == [0]
    placement = Placement(num_ranks=2)
    assert homes(placement, [call(2, branch=0)]) == [0, 1]
    assert homes(placement, [call(2, branch=0), call(2, branch=1)]) == [0, 1, 0], "rows stay where they live"


def test_wrong_split_is_found_out() -> None:
    """A forward that mixes its rows: rules that nobody declared must not be trusted."""

    def mixing(hidden: Any, timestep: Any, **_: Any) -> Any:
        return (hidden - hidden.mean(0),)

    honest, mixed = call(2), call(2)
    mixed.target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=mixing)
    assert rows.agree([Piece(call=honest, rows=(r,), batch=2) for r in range(2)], RULES)
    assert not rows.agree([Piece(call=mixed, rows=(r,), batch=2) for r in range(2)], RULES)


def test_each_piece_of_a_joined_forward_owns_its_output() -> None:
    """Neither its memory nor its version counter is shared: what one request does in place is its own business."""
    calls = [call(2, task, seed) for seed, task in enumerate("ab")]
    first, second = rows.run([Piece(call=c, rows=(0, 1), batch=2) for c in calls], RULES)
    version = second[0]._version
    first[0].zero_()
    assert second[0]._version == version
    assert first[0].untyped_storage().nbytes() == first[0].numel() * 4
    assert torch.equal(second[0], calls[1].run()[0])


def test_objects_join_only_with_themselves() -> None:
    """A repr can hide a difference: long arrays are abridged, classes print what they like."""

    class Quiet:
        def __repr__(self) -> str:
            return "Quiet()"

    one, other = call(1), call(1)
    one.kwargs["extra"]["flag"] = other.kwargs["extra"]["flag"] = same = Quiet()
    assert rows.signature(one, RULES) == rows.signature(other, RULES)
    for different in (Quiet(), np.arange(5000)):
        other.kwargs["extra"]["flag"] = different
        one.kwargs["extra"]["flag"] = same if isinstance(different, Quiet) else different * 1
        assert rows.signature(one, RULES) != rows.signature(other, RULES)


def test_rules_in_doubt_are_checked_again_when_other_arguments_carry_rows() -> None:
    """Two rows of three positions split; with two positions, shapes lie: positions are not rows."""

    def attends(hidden: Any, positions: Any) -> Any:
        return hidden + positions.sum()

    def ask(guidance: Guidance, num_positions: int, task: str) -> int:
        target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=attends)
        asked = Call(
            task_id=task,
            target=target,
            args=(torch.ones(2, 4), torch.arange(1.0, 1 + num_positions)),
            kwargs={},
            branch=0,
            ambient=Ambient.capture(),
            source=Source(lambda: None),
        )
        pieces = guidance.run([asked]).pieces
        guidance.release(task)
        return len(pieces)

    doubtful = RowRules(trusted=False)
    guidance = Guidance(rules=lambda _: doubtful, num_ranks=2, rank=0, join=False, max_rows=4)
    assert ask(guidance, 3, "a") == 2
    assert ask(guidance, 2, "b") == 1
    assert ask(guidance, 3, "c") == 2


def test_a_forward_that_asserts_about_its_rows_is_not_split() -> None:
    def picky(hidden: Any, timestep: Any, **_: Any) -> Any:
        assert hidden.shape[0] == 2
        return (hidden,)

    whole = call(2)
    whole.target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=picky)
    assert not rows.agree([Piece(call=whole, rows=(r,), batch=2) for r in range(2)], RULES)


def test_placement_and_work_forget_a_request() -> None:
    guidance = Guidance(rules=lambda _: RULES, num_ranks=1, rank=0, join=True, max_rows=4)
    bad = call(1, "bad")
    bad.target = Target(name="transformer", method="forward", stage=Stage.DENOISE, function=lambda *a, **k: 1 / 0)
    outcome = guidance.run([call(2, "good"), bad])
    assert [key[0] for key in outcome.errors] == ["bad"]
    for task in ("good", "bad"):
        guidance.release(task)
    assert not guidance.work
    assert not guidance.placement._rank
    assert not guidance.placement._cost


def test_joined_forward_runs_under_the_thread_state_of_its_calls() -> None:
    seen: list[bool] = []

    def look(hidden: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return (hidden,)

    def pieces(tasks: str) -> list[Piece]:
        made = [call(1, task) for task in tasks]
        for one in made:
            one.target, one.args, one.kwargs = dataclasses.replace(one.target, function=look), (torch.ones(1, 2),), {}
        return [Piece(call=one, rows=(0,), batch=1) for one in made]

    with torch.no_grad():
        quiet = pieces("ab")
    rows.run(quiet, RULES)
    rows.run(pieces("ab"), RULES)
    assert seen == [False, True]
    assert rows.signature(quiet[0].call, RULES) != rows.signature(pieces("c")[0].call, RULES)


def test_calls_join_only_if_what_they_share_is_equal() -> None:
    def forwards(other_ids: torch.Tensor) -> list[int]:
        guidance = Guidance(rules=lambda _: RULES, num_ranks=1, rank=0, join=True, max_rows=8)
        calls = [call(2, "a"), call(2, "b", seed=1)]
        calls[1].kwargs["ids"] = other_ids
        outcome = guidance.run(calls)
        results = guidance.finish(calls, outcome, outcome.outputs)
        for one in calls:
            assert torch.equal(results[one][0], one.run()[0])
        return [guidance.work[task].rows_joined for task in "ab"]

    assert forwards(torch.arange(2)) == [2, 2]
    assert forwards(torch.tensor([5, 6])) == [0, 0]
