"""Caches over ranks, without an engine: rows get what they would get alone.

Ranks that gather weights together and decide for themselves: whatever each has to do in a step, nobody waits for a
gather that does not come, and every rank gathers equally often. Stages: all decide alike, whatever is in flight.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from denoised.features import cache, hsdp, pipeline
from denoised.spec.model_spec import ModelSpec
from denoised.steps import rows
from denoised.steps.ambient import Ambient
from denoised.steps.deferred import Source
from denoised.steps.forward import Call, Stage, Target
from denoised.steps.rows import Piece, RowRules
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks

SPEC = ModelSpec(pipeline="Toy", declared=True)
RULES = RowRules()
NUM_BLOCKS = 5
SETTINGS = {"residual_diff_threshold": 0.1, "max_warmup_steps": 1, "max_continuous_cached_steps": -1}
TEA: dict[str, Any] = {"rel_l1_thresh": 0.05, "coefficients": [1.0, 0.0]}


class Store:
    """What a forward writes to."""

    def __init__(self) -> None:
        self.mode, self.written = "write", list[float]()


class Attention(nn.Module):
    """By the name of what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.to_q(hidden_states)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()

    def forward(self, hidden_states: Tensor, store: Store | None) -> Tensor:
        if store is not None:
            store.written.append(float(hidden_states.sum()))
        return hidden_states + self.attention(self.norm(hidden_states)).tanh()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(16, 16), nn.ModuleList([Block() for _ in range(NUM_BLOCKS)])

    def forward(self, hidden_states: Tensor, store: Store | None = None) -> Tensor:
        hidden_states = self.enter(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, store)
        return hidden_states.sin()


@dataclass(kw_only=True)
class Requests:
    """The calls of one model, and what it remembers of each row."""

    model: nn.Module
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)

    def piece(self, name: str, step: int, noise: tuple[float, ...]) -> Piece:
        """A row a number: rows of equal noise in two steps change nothing. An upper-case name has a store."""
        wave = torch.linspace(-1, 1, 5 * 16).reshape(1, 5, 16)
        kwargs: dict[str, Any] = {"hidden_states": torch.cat([(wave * 3 + value).cos() for value in noise])}
        if name.isupper():
            kwargs["store"] = self.stores.setdefault(name, Store())
        call = Call(
            task_id=name,
            target=Target(name="transformer", method="forward", stage=Stage.DENOISE, function=self.model.forward),
            args=(),
            kwargs=kwargs,
            branch=0,
            ambient=Ambient.capture(),
            source=Source(lambda: None),
            state=self.states.setdefault(name, {}),
            step=step,
            num_steps=3 * len(PROGRAM),
        )
        return Piece(call=call, rows=tuple(range(len(noise))), batch=len(noise))


# Step by step what each rank runs, or what is in flight on stages: requests by name, with the noise of each row.
# Nothing: company for the other's.
PROGRAM: list[tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]] = [
    ({"a": (0.0, 1.0)}, {"b": (0.5,)}),  # both compute
    ({"a": (0.0, 1.0)}, {"b": (2.0,)}),  # one skips
    ({"a": (0.0, 1.0)}, {"b": (2.0,)}),  # both skip
    ({"a": (0.0, 3.0)}, {"b": (2.0,)}),  # rows of one rank part, those of the other skip
    ({"a": (4.0, 3.0)}, {"b": (1.0,)}),  # the same, and the other computes
    ({"a": (4.0, 5.0)}, {"c": (0.1, 0.2)}),  # the same beside what has no past
    ({"a": (4.0, 1.0)}, {"c": (3.0, 0.2)}),  # rows of both part
    ({"a": (4.0, 1.0)}, {}),  # company that skips
    ({}, {"b": (9.0,)}),  # company that computes
    ({"a": (4.0, 2.0)}, {}),  # company for rows that part
    ({"S": (0.3,)}, {"b": (9.0,)}),  # a store is written while the other skips
    ({"S": (0.3,)}, {"c": (3.0, 5.0)}),  # and while the other parts
    ({"S": (0.4,)}, {}),  # and for company
    ({"S": (0.4,)}, {"T": (0.4,)}),  # and on both
    ({"a": (4.0, 2.0)}, {"b": (9.0,), "c": (3.0, 5.0)}),  # joined, after all that
]


def follow(rank: int, _: int, backend: str, settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = Toy().eval().requires_grad_(False)
    sharded = copy.deepcopy(plain)
    cache.apply(plain, SPEC, backend, settings, group=None)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    gathers = hsdp.apply(sharded, None, mesh)
    cache.apply(sharded, SPEC, backend, settings, group=None, convoy=dist.group.WORLD, gathers=gathers)
    alone, together = Requests(model=plain), Requests(model=sharded)
    differences, moods, mine = list[float](), list[str](), {name for parts in PROGRAM for name in parts[rank]}
    with torch.no_grad(), counted() as counts:
        for step, parts in enumerate(PROGRAM):
            own = parts[rank]
            pieces = [together.piece(name, step, noise) for name, noise in (own or parts[1 - rank]).items()]
            if not own:
                rows.run_for_company(pieces, RULES)
                continue
            found = rows.run(pieces, RULES)
            expected = [rows.run([alone.piece(name, step, noise)], RULES)[0] for name, noise in own.items()]
            differences += [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]
            moods += [decided(piece) for piece in pieces]
    return {
        "differences": differences,
        "moods": moods,
        "gathers": counts["hsdp_all_gather"],
        "agreed": counts["cache_agreed"],
        "attended": counts["cache_blocks_attended"],
        "written": {name: len(store.written) for name, store in together.stores.items() if name in mine},
    }


def decided(piece: Piece) -> str:
    """Row by row, 1 if it was computed."""
    found = sorted(piece.call.decisions, key=lambda decision: decision.row)
    return "".join("01"[decision.computed] for decision in found)


def test_whatever_each_rank_has_to_do() -> None:
    first, second = run_on_ranks(follow, 2, "cache_dit", SETTINGS)
    assert all(difference < 1e-6 for difference in first["differences"] + second["differences"])
    assert first["moods"][:7] == ["11", "00", "00", "01", "10", "01", "01"]
    assert second["moods"][:7] == ["1", "1", "0", "0", "1", "11", "10"]
    assert first["gathers"] == second["gathers"]
    assert first["agreed"] == second["agreed"] >= len(PROGRAM)
    assert first["attended"] > 0
    assert (first["written"], second["written"]) == ({"S": 4 * NUM_BLOCKS}, {"T": NUM_BLOCKS}), "once a step"


@pytest.mark.parametrize(
    ("backend", "settings"),
    [("cache_dit", SETTINGS | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}), ("tea_cache", TEA)],
)
def test_first_and_last_blocks_and_looks_are_gathered_by_all(backend: str, settings: dict[str, Any]) -> None:
    first, second = run_on_ranks(follow, 2, backend, settings)
    assert all(difference < 1e-6 for difference in first["differences"] + second["differences"])
    assert first["gathers"] == second["gathers"]
    assert "0" in "".join(first["moods"])
    assert first["attended"] > 0


# ------------------------------------------------------------------ stages


def pass_through(rank: int, size: int, backend: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What each rank of the program runs is in flight here, on all stages; again and again, for the first forward of
    each kind is watched by all."""
    torch.manual_seed(0)
    plain = Toy().eval().requires_grad_(False)
    cut = copy.deepcopy(plain)
    cache.apply(plain, SPEC, backend, settings, group=None)
    stages = pipeline.apply(cut, SPEC, dist.group.WORLD)
    cache.apply(cut, SPEC, backend, settings, group=None, stages=stages)
    alone, together = Requests(model=plain), Requests(model=cut)
    differences, moods = list[float](), list[tuple[list[str], list[str]]]()
    with torch.no_grad(), counted() as counts:
        for step, parts in enumerate(3 * PROGRAM):
            flown = [[together.piece(name, step, noise) for name, noise in part.items()] for part in parts if part]
            found = stages.run_many([functools.partial(rows.run, pieces, RULES) for pieces in flown])
            given = [(name, noise) for part in parts for name, noise in part.items()]
            solo = [alone.piece(name, step, noise) for name, noise in given]
            expected = [rows.run([piece], RULES)[0] for piece in solo]
            differences += [
                float((a - b).abs().max()) for a, b in zip(expected, [x for xs in found for x in xs], strict=True)
            ]
            moods.append(([decided(p) for p in solo], [decided(p) for pieces in flown for p in pieces]))
    kept = [
        expansion.terms[0].numel()
        for state in together.states.values()
        for row in state.get("cache", {}).values()
        for expansion in row.kept.values()
    ]
    return {
        "differences": differences,
        "moods": moods,
        "counts": dict(counts),
        "kept": sum(kept),
    }


@pytest.mark.parametrize(
    ("size", "backend", "settings"),
    [
        (2, "cache_dit", SETTINGS | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 2, "enable_taylorseer": True}),
        (3, "cache_dit", SETTINGS),
        (2, "tea_cache", TEA),
        (2, "mag_cache", {"threshold": 0.5, "mag_ratios": [0.9] * 10}),
    ],
)
def test_stages_decide_as_one_rank_does(size: int, backend: str, settings: dict[str, Any]) -> None:
    found = run_on_ranks(pass_through, size, backend, settings)
    for of_stage in found:
        assert all(difference < 1e-6 for difference in of_stage["differences"])
        assert all(alone == together for alone, together in of_stage["moods"])
        assert of_stage["moods"] == found[0]["moods"]
    skipped = sum(row == "0" for alone, _ in found[0]["moods"] for moods in alone for row in moods)
    assert skipped > 0
    assert sum(of_stage["counts"]["cache_blocks_skipped"] for of_stage in found) > 0
    assert sum(of_stage["kept"] > 0 for of_stage in found) == 1, "what a range added is on one stage"
    if backend == "cache_dit":
        assert found[0]["counts"]["cache_parted"] > 0
        assert found[0]["counts"]["cache_told"] == found[1]["counts"]["cache_told"] > 0
