"""What caches remember of a row: where it lies in a batch, when it starts anew, and how it is kept as plain data."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from denoised.features.cache import keeping
from denoised.features.cache.expansion import Expansion
from denoised.features.cache.policy import Past
from denoised.features.cache.rows import KEY, Batch, RowState, Unit, Visit, units
from denoised.features.cache.trees import at as found_at
from denoised.features.cache.trees import filled, leaves, places, skeleton
from denoised.features.cache.wrapping import named_by
from denoised.steps.forward import Call
from denoised.steps.packing import pack


def test_rows_are_found_along_their_dim() -> None:
    batch = Batch(2)
    parts = units([(_call(), (0, 1))], by_row=True)
    for shape in ((2, 5, 3), (5, 2, 3), (6, 5, 3)):
        whole = torch.arange(float(np.prod(shape))).reshape(shape)
        rows = [batch.of(unit, whole) for unit in parts]
        assert torch.equal(batch.joined(rows, whole), whole), shape
        assert [row.numel() for row in rows] == [whole.numel() // 2] * 2


def test_a_row_starts_anew_when_its_call_looks_otherwise() -> None:
    state: dict[str, Any] = {}

    def unit(step: int, **kwargs: Any) -> Unit:
        call = _call(state=state, step=step, **kwargs)
        (found,) = units([(call, (0,))], by_row=True)
        found.state.step = step
        return found

    first = unit(3, skip=[1, 2], scale=1.0).state
    assert unit(4, skip=[1, 2], scale=2.0).state is first, "single numbers may differ"
    assert unit(5, skip=[1, 3], scale=2.0).state is not first, "other blocks are left out"
    later = unit(6, skip=[1, 3], scale=2.0).state
    assert unit(1, skip=[1, 3], scale=2.0).state is not later, "the steps begin again"


def _call(state: dict[str, Any] | None = None, step: int = 0, **kwargs: Any) -> Call:
    call = object.__new__(Call)
    call.__dict__ |= {"state": {} if state is None else state, "step": step, "args": (), "kwargs": kwargs}
    return call


def test_what_rows_remember_is_kept_where_one_rank_has_all_of_it() -> None:
    """As plain data, and back; not of ranks that share a forward, and not if a block gives what cannot be told."""
    value = torch.arange(6.0).reshape(1, 2, 3)
    past = Past(seen=3, skipped=1, run=1, sums=(0.25, 1.0))
    bare = skeleton({"a": value, "b": (None, [value])})
    known = RowState(
        sign=[("x", "(1, 2)")],
        by="a cache",
        step=2,
        past=past,
        seen=[value],
        visits=(Visit(stack="blocks", bare=bare, continues={("a",): ("x", 0)}),),
        kept={(4, ("a",)): Expansion(terms=(value, value + 1), at=2)},
    )
    states = {("transformer", 1): {KEY: {(0, 1): known}}, ("transformer", 0): {"other": 1}}
    told = pack(keeping.keep(states)).unpack()
    (found,) = keeping.restore(told, torch.device("cpu"))[("transformer", 1)][KEY].values()
    assert (found.sign, found.by, found.step, found.past) == (known.sign, known.by, known.step, known.past)
    assert found.visits == known.visits
    assert torch.equal(found.seen[0], value)
    ((key, expansion),) = found.kept.items()
    assert (key, expansion.at) == ((4, ("a",)), 2)
    assert [term.tolist() for term in expansion.terms] == [value.tolist(), (value + 1).tolist()]
    for other in (replace(known, alone=False), replace(known, visits=(replace(known.visits[0], bare=object()),))):
        assert keeping.keep({("transformer", 0): {KEY: {(0,): known, (1,): other}}}) is None


def test_arguments_are_named_as_python_does() -> None:
    def plain(a: Any, /, b: Any = 1, *, c: Any = 2) -> None: ...

    def open_(a: Any, *rest: Any, **more: Any) -> None: ...

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (plain, (1,), {}),
        (plain, (1, 2), {"c": 3}),
        (plain, (1,), {"c": 3, "b": 2}),
        (open_, (1, 2, 3), {"d": 4}),
    ]
    for function, args, kwargs in calls:
        assert named_by(function)(args, kwargs) == inspect.signature(function).bind(*args, **kwargs).arguments


def test_trees_keep_what_is_no_tensor() -> None:
    tree = (None, [torch.zeros(1), 3], {"a": torch.ones(2)})
    bare = skeleton(tree)
    assert set(places(bare)) == set(leaves(tree)) == {(1, 0), (2, "a")}
    assert all(found_at(tree, path) is tensor for path, tensor in leaves(tree).items())
    again = filled(bare, leaves(tree))
    assert again[0] is None
    assert again[1][1] == 3
    assert again[2]["a"] is tree[2]["a"]
