"""What rows remember of their steps, as plain data for checkpoints, and back.

Kept only where one rank has all of it: of ranks that share a forward each has a part, which would fit no other layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from denoised.features.cache.expansion import Expansion
from denoised.features.cache.policy import Past
from denoised.features.cache.rows import KEY, RowState, Visit
from denoised.features.cache.trees import Place
from denoised.steps.packing import UnpackableError, pack
from denoised.steps.trees import rebuild

# What a task keeps of the calls of a denoiser and branch.
States = Mapping[tuple[str, int], Mapping[str, Any]]
_PLACE = "a tensor was here"


def keep(states: States) -> Any:
    """A tree that `steps.packing` knows; None if it cannot be told, so that a request goes on from its start."""
    rows = [(*key, rows, state) for key, kept in states.items() for rows, state in kept.get(KEY, {}).items()]
    if not rows or not all(state.alone for *_, state in rows):
        return None
    found = [(name, branch, numbers, _plain(state)) for name, branch, numbers, state in rows]
    try:
        pack(found, copy=False)
    except UnpackableError:
        return None
    return found


def restore(found: Any, device: torch.device) -> dict[tuple[str, int], dict[str, Any]]:
    """The inverse of `keep`. Raises KeyError, TypeError or ValueError if it did not make this."""
    states: dict[tuple[str, int], dict[str, Any]] = {}
    for name, branch, rows, plain in found:
        states.setdefault((name, branch), {KEY: {}})[KEY][rows] = _state(plain, device)
    return states


def _plain(state: RowState) -> dict[str, Any]:
    return {
        "sign": state.sign,
        "by": state.by,
        "step": state.step,
        "past": asdict(state.past),
        "seen": state.seen,
        "visits": [(visit.stack, _told(visit.bare), visit.continues) for visit in state.visits],
        "kept": [(key, expansion.terms, expansion.at) for key, expansion in state.kept.items()],
    }


def _state(plain: Any, device: torch.device) -> RowState:
    return RowState(
        sign=plain["sign"],
        by=plain["by"],
        step=plain["step"],
        past=Past(**plain["past"]),
        seen=[tensor.to(device) for tensor in plain["seen"]],
        visits=tuple(
            Visit(stack=stack, bare=_meant(bare), continues=continues) for stack, bare, continues in plain["visits"]
        ),
        kept={
            key: Expansion(terms=tuple(term.to(device) for term in terms), at=at) for key, terms, at in plain["kept"]
        },
    )


def _told(bare: Any) -> Any:
    """A skeleton without dataclasses."""
    if isinstance(bare, Place):
        return (_PLACE, bare.path)
    if isinstance(bare, dict):
        return rebuild(bare, {name: _told(part) for name, part in bare.items()})
    return type(bare)(_told(part) for part in bare) if type(bare) in (list, tuple) else bare


def _meant(told: Any) -> Any:
    if type(told) is tuple and told[:1] == (_PLACE,):
        return Place(told[1])
    if isinstance(told, dict):
        return rebuild(told, {name: _meant(part) for name, part in told.items()})
    return type(told)(_meant(part) for part in told) if type(told) in (list, tuple) else told
