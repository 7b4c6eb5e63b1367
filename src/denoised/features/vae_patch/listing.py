"""What a VAE asks of its encoder and decoder: listed without computing, and looked up when it has been computed.

Knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Tile = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCall:
    """A call of encoder or decoder (`part`), as it was listed."""

    part: nn.Module
    forward: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Tensor:
        return self.forward(*self.args, **self.kwargs)

    def values(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def size(self) -> int:
        """A measure of its work."""
        return sum(value.numel() for value in self.values() if isinstance(value, Tensor))


@dataclass(kw_only=True)
class _Pass:
    """What one run of `encode` or `decode` is for: to list calls, or to find their `outputs`, in order."""

    calls: list[TileCall] = field(default_factory=list)
    outputs: Iterator[Tensor] | None = None

    def answer(self, call: TileCall) -> Tensor:
        if self.outputs is not None:
            return next(self.outputs)
        self.calls.append(call)
        return _empty(call.args[0])


class Desk:
    """Stands between a VAE and its encoder and decoder. Between runs it holds nothing."""

    def __init__(self) -> None:
        self._pass: _Pass | None = None

    def part(self, part: nn.Module) -> Callable[..., Tensor]:
        """A forward for encoder or decoder that is listed, looked up, or outside of both simply run."""
        forward = part.forward

        @functools.wraps(forward)
        def answered(*args: Any, **kwargs: Any) -> Tensor:
            call = TileCall(part=part, forward=forward, args=args, kwargs=kwargs)
            return call.run() if self._pass is None else self._pass.answer(call)

        return answered

    def listed(self, run: Callable[[], Any]) -> list[TileCall]:
        with self._during(_Pass()) as listing:
            run()
        return listing.calls

    def found(self, run: Callable[[], Any], outputs: Sequence[Tensor]) -> Any:
        with self._during(_Pass(outputs=iter(outputs))):
            return run()

    @contextlib.contextmanager
    def _during(self, run: _Pass) -> Iterator[_Pass]:
        assert self._pass is None, "encode and decode do not nest"
        self._pass = run
        try:
            yield run
        finally:
            self._pass = None


def quiet(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For the small convolutions around encoder and decoder, which would not take an empty tensor."""

    @functools.wraps(forward)
    def quieted(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if isinstance(x, Tensor) and not x.numel() else forward(x, *args, **kwargs)

    return quieted


def _empty(x: Tensor) -> Tensor:
    """Stands for a tile while calls are listed. Two channels, because posteriors are split in two."""
    return x.new_empty((x.shape[0], 2, *[0] * (x.ndim - 2)))


def tiles_of(calls: Sequence[TileCall]) -> list[Tile]:
    """The calls of each tile, by number and in order. Calls that hand on one list (a video VAE's features of earlier
    frames) depend on each other and are one tile."""
    tiles: list[Tile] = []
    by_list: dict[int, Tile] = {}
    for number, call in enumerate(calls):
        handed = [id(value) for value in call.values() if isinstance(value, list)]
        tile = next((by_list[key] for key in handed if key in by_list), None)
        if tile is None:
            tile = []
            tiles.append(tile)
        tile.append(number)
        by_list |= dict.fromkeys(handed, tile)
    return tiles
