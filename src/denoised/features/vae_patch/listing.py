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

from denoised.features.vae_patch.standins import FORMS, Form, HandedOn

Tile = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCall:
    """A call of encoder or decoder (`part`), as it was listed. `forget`, `epoch`: of a VAE whose modules keep features
    until it calls `forget`; how often it had."""

    part: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 0
    form: Form = FORMS[0]
    forget: Callable[[], None] | None = None
    epoch: int = 0

    def run(self, handed: dict[int, Any]) -> Tensor:
        """Its output. `handed`: what earlier calls of its tile handed on, by number; what this one does is added."""
        args = [_taken(value, handed) for value in self.args]
        output = self.forward(*args, **{name: _taken(value, handed) for name, value in self.kwargs.items()})
        if self.form.is_pair:
            output, handed[self.number] = output
        return output  # type: ignore[no-any-return]

    def values(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def links(self) -> set[tuple[str, int]]:
        """Calls that have one in common depend on each other."""
        found = {("list", id(value)) for value in self.values() if isinstance(value, list)}
        found |= {("handed on", value.number) for value in self.values() if isinstance(value, HandedOn)}
        return found | ({("epoch", self.epoch)} if self.forget else {("handed on", self.number)})

    def size(self) -> int:
        """A measure of its work."""
        return sum(value.numel() for value in self.values() if isinstance(value, Tensor))


def _taken(value: Any, handed: dict[int, Any]) -> Any:
    return handed.pop(value.number) if isinstance(value, HandedOn) else value


@dataclass(kw_only=True)
class _Pass:
    """What one run of `encode` or `decode` is for: to list calls, or to find their `outputs`, in order."""

    calls: list[TileCall] = field(default_factory=list)
    outputs: Iterator[Tensor] | None = None


class Desk:
    """Stands between a VAE and its encoder and decoder. Between runs it holds nothing.

    `form` and `forget` are of the VAE (see `Form`, `TileCall`).
    """

    def __init__(self) -> None:
        self.form: Form = FORMS[0]
        self.forget: Callable[[], None] | None = None
        self._epoch = 0
        self._pass: _Pass | None = None

    def part(self, part: nn.Module) -> Callable[..., Any]:
        """A forward for encoder or decoder that is listed, looked up, or outside of both simply run."""
        forward = part.forward

        @functools.wraps(forward)
        def answered(*args: Any, **kwargs: Any) -> Any:
            if self._pass is None:
                return forward(*args, **kwargs)
            if self._pass.outputs is not None:
                return self.form.found(next(self._pass.outputs))
            return self._listed(part, forward, args, kwargs)

        return answered

    def _listed(
        self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self._pass is not None
        number = len(self._pass.calls)
        state = {"form": self.form, "forget": self.forget, "epoch": self._epoch}
        self._pass.calls.append(
            TileCall(part=part, forward=forward, args=args, kwargs=kwargs, number=number, **state)  # type: ignore[arg-type]
        )
        return self.form.answer(args[0], number)

    def forgot(self) -> None:
        """What is called from now on does not depend on what was called."""
        self._epoch += 1

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


def tiles_of(calls: Sequence[TileCall]) -> list[Tile]:
    """The calls of each tile, by number and in order. Calls that depend on each other (by a video VAE's features of
    earlier frames, handed on or kept) are one tile."""
    tiles: list[Tile] = []
    linked: dict[tuple[str, int], Tile] = {}
    for number, call in enumerate(calls):
        links = call.links()
        tile = next((linked[link] for link in links if link in linked), None)
        if tile is None:
            tile = []
            tiles.append(tile)
        tile.append(number)
        linked |= dict.fromkeys(links, tile)
    return tiles
