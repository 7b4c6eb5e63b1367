"""Rows: a denoiser call is a batch of independent rows (request x image x guidance branch).

Split a call into rows, join rows of several calls into one forward, put the results together.
Which arguments carry rows is read off their shapes; what shapes cannot tell, the model's spec says (`RowRules`).
A piece that is a whole call runs with the call's own arguments, so on one rank nothing is copied or re-ordered.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from denoised.steps.forward import Call, PartedError, for_company, run_joined
from denoised.steps.trees import Tree, carries_rows, concatenate, rebuild, shape_signature, shared_leaves, take


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """Which arguments of a denoiser carry rows, where their shapes do not tell.

    shared: arguments that are the same for all rows, whatever their shape says.
    lists: arguments that are lists with one entry a row.
    dims: tensor arguments whose rows are along another dim than 0, and which.
    folded: tensor arguments with several entries a row along dim 0, those of a row side by side (one a frame).
    padded: text arguments [rows, tokens, ...] that may be padded at the end, and the name of their mask
        [rows, tokens], which may be None: rows with texts of different lengths can then share a forward.
        "" for a model that is told the lengths instead.
    whole: the call cannot be split or joined (packed sequences).
    trusted: False makes the engine compare a split forward with a whole one before it relies on it.
    """

    shared: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    dims: dict[str, int] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()
    padded: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    trusted: bool = True


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one call, run on one rank."""

    call: Call
    rows: tuple[int, ...]
    batch: int

    @property
    def is_whole(self) -> bool:
        return len(self.rows) == self.batch

    @property
    def key(self) -> tuple[str, str, int, tuple[int, ...]]:
        """The same on every rank."""
        return (self.call.task_id, self.call.target.name, self.call.branch, self.rows)


def batch_size(call: Call) -> int:
    """Rows of a call: dim 0 of its leading tensor argument, or the length of a leading list of tensors."""
    first = call.lead()
    if isinstance(first, torch.Tensor):
        return first.shape[0] if first.dim() else 1
    return len(first) if isinstance(first, list | tuple) else 1


def cost(call: Call) -> int:
    """Work of one row in relative units: elements of its latents."""
    first = call.lead()
    leaves = first if isinstance(first, list | tuple) else [first]
    elements = sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))
    return max(1, elements // max(1, batch_size(call)))


def row_pattern(call: Call, rules: RowRules) -> Any:
    """Which arguments carry rows: what a check of untrusted rules has to be repeated for."""
    batch = batch_size(call)
    return batch, tuple(
        (
            name,
            name in rules.shared
            or _pattern(_rows_first(name, value, rules, batch), batch, as_list=name in rules.lists),
        )
        for name, value in sorted(call.named_arguments().items())
    )


def _pattern(value: Tree, batch: int, *, as_list: bool) -> Any:
    if carries_rows(value, batch, as_list=as_list):
        return "rows"
    if isinstance(value, dict):
        return tuple((k, _pattern(x, batch, as_list=False)) for k, x in value.items())
    if type(value) in (list, tuple):
        return tuple(_pattern(x, batch, as_list=False) for x in value)
    return type(value).__name__


def signature(call: Call, rules: RowRules) -> Any:
    """Calls of equal signature may share a forward if their shared tensors are equal too."""
    named = sorted(call.named_arguments().items())
    idle = call.target.stores if not call.stateful else frozenset()
    arguments = tuple(
        (name, "idle" if name in idle else _argument_signature(name, value, batch_size(call), rules))
        for name, value in named
    )
    return (call.target.name, call.adapters, call.ambient, arguments)


def _argument_signature(name: str, value: Tree, batch: int, rules: RowRules) -> Any:
    if name in rules.shared:
        return ("shared", shape_signature(value, -1))
    if name in rules.padded and isinstance(value, torch.Tensor):
        return ("padded", value.shape[2:], value.dtype)
    if name in rules.padded.values():
        return ("mask",)
    return shape_signature(_rows_first(name, value, rules, batch), batch, as_list=name in rules.lists)


def _rows_first(name: str, value: Tree, rules: RowRules, batch: int) -> Tree:
    """The argument with its rows along dim 0, one entry a row, where its shape tells them."""
    if not isinstance(value, torch.Tensor):
        return value
    if name in rules.folded:
        return value.reshape(batch, -1, *value.shape[1:])
    return value.movedim(rules.dims[name], 0) if name in rules.dims else value


def _rows_back(name: str, value: Tree, rules: RowRules) -> Tree:
    """The inverse of `_rows_first`."""
    if name in rules.folded and isinstance(value, torch.Tensor):
        return value.flatten(0, 1)
    return value.movedim(0, rules.dims[name]) if name in rules.dims and isinstance(value, torch.Tensor) else value


def shares_tensors(a: Call, b: Call, rules: RowRules) -> bool:
    """Whether the tensors that rows of both calls would share are equal."""
    return all(torch.equal(x, y) for x, y in zip(_shared(a, rules), _shared(b, rules), strict=True))


def _shared(call: Call, rules: RowRules) -> list[torch.Tensor]:
    batch = batch_size(call)
    leaves: list[torch.Tensor] = []
    for name, value in sorted(call.named_arguments().items()):
        if name in rules.padded or name in rules.padded.values():
            continue
        value = _rows_first(name, value, rules, batch)
        leaves += shared_leaves(value, -1 if name in rules.shared else batch, as_list=name in rules.lists)
    return leaves


def arguments(piece: Piece, rules: RowRules) -> dict[str, Any]:
    """The call's keyword arguments, cut down to the rows of the piece."""
    return {
        name: value if name in rules.shared else _taken(name, value, piece, rules)
        for name, value in piece.call.named_arguments().items()
    }


def _taken(name: str, value: Tree, piece: Piece, rules: RowRules) -> Tree:
    rows_first = _rows_first(name, value, rules, piece.batch)
    return _rows_back(name, take(rows_first, piece.rows, piece.batch, as_list=name in rules.lists), rules)


def run(pieces: Sequence[Piece], rules: RowRules) -> list[Tree]:
    """One forward over all pieces, or one for each group of rows that cannot go together; the output of each piece."""
    try:
        return _run(pieces, rules)
    except PartedError as parted:
        return _run_parted(pieces, parted.groups, rules)


def run_for_company(pieces: Sequence[Piece], rules: RowRules) -> None:
    """Take part in the collectives of a forward whose result is another rank's; so is its error."""
    with for_company(), contextlib.suppress(Exception):
        run(pieces, rules)


def _run_parted(pieces: Sequence[Piece], groups: Sequence[tuple[int, ...]], rules: RowRules) -> list[Tree]:
    places = [(piece, row) for piece in pieces for row in piece.rows]
    found: dict[int, list[tuple[Piece, Tree]]] = {number: [] for number in range(len(pieces))}
    for together in groups:
        if not together:
            run_for_company(pieces, rules)
            continue
        chosen = [places[place] for place in together]
        parts = [_of(piece, [row for other, row in chosen if other is piece]) for piece in pieces]
        numbers = [number for number, part in enumerate(parts) if part.rows]
        outputs = _run([parts[number] for number in numbers], rules)
        for number, output in zip(numbers, outputs, strict=True):
            found[number].append((parts[number], output))
    done = [pairs for pairs in found.values() if pairs]
    return [assemble([part for part, _ in pairs], [output for _, output in pairs]) for pairs in done]


def _of(piece: Piece, rows: list[int]) -> Piece:
    return Piece(call=piece.call, rows=tuple(rows), batch=piece.batch)


def _run(pieces: Sequence[Piece], rules: RowRules) -> list[Tree]:
    if len(pieces) == 1 and pieces[0].is_whole:
        return [pieces[0].call.run(pieces[0].rows)]
    batches = [len(piece.rows) for piece in pieces]
    parts = [arguments(piece, rules) for piece in pieces]
    if len(parts) > 1:
        parts = _equal_lengths(parts, batches, rules)
    kwargs = {name: _joined(name, [p[name] for p in parts], batches, rules) for name in parts[0]}
    output = run_joined(tuple((p.call, p.rows) for p in pieces), kwargs)
    return _separate(output, batches)


def _joined(name: str, values: list[Tree], batches: list[int], rules: RowRules) -> Tree:
    if name in rules.shared or len(values) == 1:
        return values[0]
    rows_first = [_rows_first(name, value, rules, batch) for value, batch in zip(values, batches, strict=True)]
    return _rows_back(name, concatenate(rows_first, batches, as_list=name in rules.lists), rules)


def _equal_lengths(parts: list[dict[str, Any]], batches: list[int], rules: RowRules) -> list[dict[str, Any]]:
    """Texts padded to the longest, with a mask that leaves the padding out; as they are if all have one length."""
    for text, mask in rules.padded.items():
        lengths = [p[text].shape[1] for p in parts]
        if len(set(lengths)) > 1 or any(p.get(mask) is not None for p in parts):
            parts = [_padded(p, text, mask, max(lengths)) for p in parts]
    return parts


def _padded(part: dict[str, Any], text: str, mask: str, length: int) -> dict[str, Any]:
    value, given = part[text], part.get(mask)
    missing = length - value.shape[1]
    empty = (0, 0) * (value.dim() - 2)
    padded = {text: F.pad(value, (*empty, 0, missing))}
    if mask:
        seen = value.new_ones(value.shape[:2], dtype=torch.bool) if given is None else given.bool()
        padded[mask] = F.pad(seen, (0, missing))
    return part | padded


def _separate(output: Tree, batches: list[int]) -> list[Tree]:
    """The part of each piece, in memory of its own: requests neither keep nor change each other's rows."""
    if len(batches) == 1:
        return [output]
    ends = list(itertools.accumulate(batches))
    ranges = [tuple(range(end - size, end)) for end, size in zip(ends, batches, strict=True)]
    return [_copied(take(output, rows, ends[-1], as_list=True)) for rows in ranges]


def _copied(value: Tree) -> Tree:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(x) for x in value)
    return rebuild(value, {k: _copied(x) for k, x in value.items()}) if isinstance(value, dict) else value


def assemble(pieces: Sequence[Piece], outputs: Sequence[Tree]) -> Tree:
    """The output of a whole call from those of its pieces, rows in their own order."""
    if len(pieces) == 1:
        return outputs[0]
    joined = concatenate(list(outputs), [len(p.rows) for p in pieces], as_list=True)
    order = [row for piece in pieces for row in piece.rows]
    places = tuple(sorted(range(len(order)), key=order.__getitem__))
    return take(joined, places, len(order), as_list=True)


def agree(pieces: Sequence[Piece], rules: RowRules) -> bool:
    """Whether one forward over the pieces gives what a forward for each gives: the check of untrusted rules.

    The bound is on the relative norm: loose enough for bf16, far tighter than any wrong split.
    """
    try:
        apart = [run([_anew(piece)], rules)[0] for piece in pieces]
        together = run([_anew(piece) for piece in pieces], rules)
        return all(map(_close, apart, together))
    except Exception:
        return False  # a forward that cannot take the split arguments answers the question


def _anew(piece: Piece) -> Piece:
    """With a call of its own: what features keep of a request's steps must not see a forward that is no step."""
    return replace(piece, call=replace(piece.call, state={}, decisions=[]))


def _close(a: Tree, b: Tree) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool((a - b).float().norm() <= 0.03 * a.float().norm() + 1e-6)
    if isinstance(a, dict):
        return all(_close(a[k], b[k]) for k in a)
    return all(map(_close, a, b)) if isinstance(a, list | tuple) else True
