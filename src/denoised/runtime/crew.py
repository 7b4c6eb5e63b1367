"""The ranks of one engine, one generation after another: starting them, waiting until they are ready, ending them.

Knows nothing of requests. What ranks say lands in the client's mailbox, marked with their generation.
"""

from __future__ import annotations

import collections
import queue
from collections.abc import Callable

from denoised.config import EngineConfig
from denoised.errors import EngineError, ModelError, one_line
from denoised.runtime import launch
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Command, Event, Failed, RankSpec, Ready

# A rank that dies while loading dies again; three tries rule out bad luck.
MAX_STARTS = 3
_CLOSED = "it was closed."

RankSays = tuple[int, int, Event | None]
"""Generation, rank, and what the rank says; None: it is gone."""
Item = RankSays | Callable[[], None]


class Mailbox:
    """What ranks say and what callers ask, in order. What is asked while ranks start waits for the next `get`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._postponed: collections.deque[Item] = collections.deque()

    def put(self, item: Item) -> None:
        self._queue.put(item)

    def get(self) -> Item:
        return self._postponed.popleft() if self._postponed else self._queue.get()

    def get_from_ranks(self) -> RankSays | None:
        """What a rank says next; None after something that a caller asks, which is postponed."""
        item = self._queue.get()
        if callable(item):
            self._postponed.append(item)
            return None
        return item

    def empty(self) -> bool:
        return self._queue.empty() and not self._postponed


class Crew:
    """Ranks that can be replaced. `closed` says whether the client has been closed meanwhile."""

    def __init__(self, config: EngineConfig, mailbox: Mailbox, closed: Callable[[], bool]) -> None:
        self._config, self._mailbox, self._closed = config, mailbox, closed
        self._ranks: launch.Ranks | None = None
        self.torchrun = launch.torchrun_rank()
        self.generation = 0

    @property
    def pids(self) -> list[int]:
        """Process ids; empty where the one rank is a thread of this process."""
        return list(self._ranks.pids) if self._ranks is not None else []

    def send(self, command: Command) -> None:
        # The other ranks of torchrun hear of it from rank 0.
        if self._ranks is not None and self.torchrun in (None, 0):
            self._ranks.send(command)

    def start(self) -> ModelInfo:
        """Start ranks, in place of those that are there, and wait until all are ready.

        Raises:
            ModelError, InvalidConfigError: the user's to mend.
            EngineError: ranks died `MAX_STARTS` times, or the client was closed.
        """
        problem = ""
        for _ in range(MAX_STARTS):
            self.kill()
            if self._closed():
                raise EngineError(_CLOSED)
            self.generation += 1
            try:
                self._ranks = self._launch(self.generation)
            except (EngineError, EOFError, OSError) as error:
                problem = f"the ranks could not be started ({one_line(error)})."
                continue
            info, problem = self._await_ready()
            if info is not None:
                return info
        self.kill()
        raise EngineError(problem)

    def stop(self) -> None:
        """Ask the ranks to end; whatever they still say is history."""
        self.generation += 1
        self.send(Command(stop=True))

    def join(self) -> None:
        """Wait a while for ranks that were asked to end, then end them."""
        if self._ranks is not None:
            self._ranks.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks.join(timeout=10)
            self._ranks = None

    def _await_ready(self) -> tuple[ModelInfo | None, str]:
        """What was loaded, or why nothing was."""
        size = self._config.parallel_config.world_size
        waiting = set(range(size)) if self.torchrun is None else {self.torchrun}
        while True:
            said = self._mailbox.get_from_ranks()
            if self._closed():
                return None, _CLOSED
            if said is None or said[0] != self.generation:
                continue
            _, rank, event = said
            if isinstance(event, Ready):
                waiting.discard(rank)
                if not waiting:
                    return event.info, ""
            elif isinstance(event, Failed) and event.by_user:
                self.kill()
                raise ModelError(event.error)
            elif event is None or isinstance(event, Failed):
                return None, f"rank {rank} " + (f"failed: {event.error}" if event else "died while it started")

    def _launch(self, generation: int) -> launch.Ranks:
        def deliver(rank: int, event: Event | None) -> None:
            self._mailbox.put((generation, rank, event))

        if self.torchrun is not None:
            return launch.ThreadRank(launch.torchrun_spec(self._config), deliver)
        if self._config.parallel_config.world_size == 1:
            spec = RankSpec(config=self._config, rank=0, local_rank=0, world_size=1, local_world_size=1)
            return launch.ThreadRank(spec, deliver)
        return launch.shared_host().fork(self._config, deliver)
