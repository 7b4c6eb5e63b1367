"""Two ranks exchange trees of tensors: whatever changes, both stay in step or both stop."""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from denoised.steps.wire import DesyncError, Parcel, Wire


def _rank(rank: int, store: str, bodies: list[Callable[[Wire], None]], answers: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        group = dist.group.WORLD
        assert group is not None
        for body in bodies:
            body(Wire(control=group, data=group, device=torch.device("cpu")))
        answers.put(None)
        dist.destroy_process_group()
    except BaseException:
        answers.put(traceback.format_exc())


KEYS = [("a", "transformer", 0, (0,)), ("a", "transformer", 1, (0,)), ("b", "transformer", 0, (0,))]
RANKS = [0, 1, 1]


def tick(wire: Wire, trees: list[Any]) -> list[Any]:
    """One exchange: tree i is computed by RANKS[i]."""
    mine = {key: tree for key, rank, tree in zip(KEYS, RANKS, trees, strict=True) if rank == wire.rank}
    assert not wire.prepare(mine)
    header = wire.header(digest=1, errors=False, commands=False)
    if header.news:
        wire.learn_layouts()
    parcels = [Parcel(rank=rank, key=key) for key, rank in zip(KEYS, RANKS, strict=True)]
    got = wire.exchange(parcels, mine)
    return [got[key] for key in KEYS]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _layouts_that_change(wire: Wire) -> None:
    """Shapes may change from step to step under one key: the sender says so, and nobody reads old shapes."""
    for step in (2, 2, 3):
        trees: list[Any] = [(torch.full((1, step), 1.0), None), [torch.ones(step, 3, dtype=torch.bool)]]
        trees.append((torch.full((step,), 2, dtype=torch.int64), torch.tensor(1.5, dtype=torch.bfloat16)))
        assert all(map(_same, tick(wire, trees), trees)), (wire.rank, step)
    assert len(wire._layouts) == 3
    wire.forget("a")
    assert {key[0] for key in wire._layouts} == {"b"}
    wire.forget("b")
    assert not wire._layouts


def _what_cannot_travel(wire: Wire) -> None:
    for tree in ((torch.ones(1), lambda: None), {"weights": torch.nn.Linear(1, 1)}, [torch.ones(1), threading.Lock()]):
        assert "cannot travel" in wire.prepare({KEYS[0]: tree})[KEYS[0]], tree
        assert not wire.carries(tree)


def _objects(wire: Wire) -> None:
    """What is no tree of tensors comes out as it was: encoders give distributions, and stores of keys and values."""
    mean = torch.arange(16.0).reshape(1, 4, 2, 2) + 100 * wire.rank  # rank 0 is the sender of the first
    made = {"dist": DiagonalGaussianDistribution(mean), "steps": 3}
    assert wire.carries(made)
    assert wire.carries(torch.ones(4), max_bytes=16)
    assert not wire.carries(torch.ones(5), max_bytes=16)
    got = tick(wire, [made, torch.ones(1), {"text": "b", "more": (torch.zeros(2), 0.5)}])
    found = got[0]["dist"]
    assert (type(found), got[0]["steps"], got[2]["text"], got[2]["more"][1]) == (type(made["dist"]), 3, "b", 0.5)
    assert torch.equal(found.mean.flatten(), torch.arange(8.0))


def _disagreement(wire: Wire) -> None:
    with pytest.raises(DesyncError, match="disagree"):
        wire.header(digest=wire.rank, errors=False, commands=False)


def _flags(wire: Wire) -> None:
    """Any rank's error is everybody's; only rank 0 has commands."""
    header = wire.header(digest=1, errors=wire.rank == 1, commands=wire.rank == 1)
    assert (header.errors, header.commands, header.news) == (True, False, False)
    assert wire.gather_objects(wire.rank) == [0, 1]
    assert wire.from_first("ab"[wire.rank]) == "a"


def test_two_ranks_stay_in_step_or_stop(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    bodies = [_layouts_that_change, _what_cannot_travel, _objects, _flags, _disagreement]
    processes = [context.Process(target=_rank, args=(r, str(tmp_path / "s"), bodies, answers)) for r in range(2)]
    for process in processes:
        process.start()
    problems = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=20)
    assert problems == [None, None], problems
