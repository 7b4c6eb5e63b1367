"""What stages send each other in one wave of rows: every letter is known beforehand, and so is its place.

Never a deadlock, because there is one order of all letters of all ranks, that of the turns that write them. A rank
posts its own, sent and received, in that order, and waits for one only in a turn that comes later: so whatever is
first of all that has not arrived waits for nothing. This holds where sends wait for their receives, and where all
letters of a pair or of a group are served one by one (NCCL). Receives are posted as early as the order allows, so
that letters travel while blocks run.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from denoised.features.pipeline.clock import Clock
from denoised.features.pipeline.plan import Key, Letter
from denoised.steps.collectives import Arriving, Group, Posted


class Mail:
    """This rank's letters. failure: of the wire; then nobody can go on."""

    def __init__(self, letters: Iterable[Letter], group: Group, device: torch.device, clock: Clock) -> None:
        self._group, self._device, self._clock, self._here = group, device, clock, group.rank()
        self._letters = [letter for letter in letters if self._here in (letter.source, letter.to)]
        self._next = 0
        self._arriving: dict[Key, Arriving] = {}
        self._sent: defaultdict[int, list[Posted]] = defaultdict(list)
        self.failure: Exception | None = None
        self._expect()

    def send(self, key: Key, to: int, tensor: torch.Tensor) -> None:
        letter = self._letters[self._next]
        assert (letter.key, letter.source, letter.to) == (key, self._here, to), "a letter out of turn"
        with self._wire():
            self._sent[key.row].append(Posted(tensor, self._group, to=to))
        self._next += 1
        self._expect()

    def take(self, key: Key) -> torch.Tensor:
        with self._clock.waiting(), self._wire():
            return self._arriving.pop(key).wait()

    def settle(self, row: int) -> None:
        """What the row sent in earlier turns has arrived, as its new turn has what it needs; so the copies can go."""
        sent = self._sent.pop(row, [])
        if sent:
            with self._clock.waiting(), self._wire():
                for posted in sent:
                    posted.wait()

    def settle_all(self) -> None:
        for row in list(self._sent):
            self.settle(row)

    def _expect(self) -> None:
        """Post receives up to the next letter that is sent from here."""
        while self._next < len(self._letters) and self._letters[self._next].source != self._here:
            letter = self._letters[self._next]
            with self._wire():
                like = letter.shape.outline(self._device)
                self._arriving[letter.key] = Arriving(like, self._group, source=letter.source)
            self._next += 1

    @contextlib.contextmanager
    def _wire(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise
