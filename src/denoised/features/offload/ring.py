"""Blocks of one component that come one after the other: the next is fetched while one computes.

What comes next is what came next the last time. So nothing is said of any model, of stages that take turns, or of
blocks that a cache skips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from denoised.features.offload.store import Group, Store
from denoised.steps.tally import count


class Ring:
    """The blocks of one component.

    num_blocks: how many may be here at once, beside the one that is fetched. All but the last of them stay while the
        component is in use; the others take turns.
    """

    def __init__(self, store: Store, blocks: list[nn.Module], num_blocks: int) -> None:
        self._store, self.blocks, self._num_kept = store, blocks, num_blocks - 1
        self._groups: list[Group | None] = [None] * len(blocks)
        self._after = {index: index + 1 for index in range(len(blocks) - 1)}
        self._last: int | None = None
        self._next: int | None = None
        self._kept: dict[int, Group] = {}
        self.enter: Callable[[], None] = lambda: None
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = self._gate(index, block.forward)

    def find(self) -> int:
        """Find the blocks' weights, once all that cuts and drops weights has been there; how many bytes take turns."""
        for index, block in enumerate(self.blocks):
            group = self._store.group([block])
            self._groups[index] = group if group.cells else None  # another rank's block has none
        return sum(group.num_bytes for group in self._groups if group is not None)

    def _gate(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def gated(*args: Any, **kwargs: Any) -> Any:
            group = self._groups[index]
            if group is None:
                return forward(*args, **kwargs)
            self.enter()
            self._store.hold(group)
            try:
                self._begin(index, group)
                return forward(*args, **kwargs)
            finally:
                self._store.let_go(group)

        return gated

    def _begin(self, index: int, group: Group) -> None:
        """The block is here and about to run: keep it if it is one of those, and fetch the next."""
        count("offload_blocks")
        if self._last is not None:
            self._after[self._last] = index
        self._last = index
        if index not in self._kept and len(self._kept) < self._num_kept:
            self._kept[index] = group
            self._store.hold(group)
        self._expect(self._after.get(index))

    def _expect(self, index: int | None) -> None:
        """Fetch this block next; what was expected before and has not come is not waited for."""
        if self._next not in (None, index):
            assert self._next is not None
            self._store.forget(self._groups[self._next])  # type: ignore[arg-type]
        self._next = index
        group = None if index is None else self._groups[index]
        if group is not None:
            self._store.fetch_ahead(group)

    def leave(self) -> None:
        """The component is not needed for a while."""
        self._expect(None)
        for group in self._kept.values():
            self._store.let_go(group)
        self._kept.clear()
        self._last = None
