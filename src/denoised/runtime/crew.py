"""The ranks of one replica, one generation after another: starting them, waiting until they are ready, ending them.

Knows nothing of requests, nor of other replicas. What ranks say goes to the client, marked with their generation.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from denoised.config import EngineConfig
from denoised.errors import EngineError, InvalidConfigError, ModelError, one_line
from denoised.runtime import launch, torchrun
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Command, Deliver, Event, Failed, RankSpec, Ready
from denoised.runtime.relay import Follower, Leader

# A rank that dies while loading dies again; three tries rule out bad luck.
MAX_STARTS = 3
_CLOSED = "it was closed."

Say = Callable[[int, int, Event | None], None]
"""Takes a generation, a rank of it, and what that rank says; None: it is gone."""


class Line:
    """What the ranks of one generation say: to the one who starts them until they are ready, then to the client."""

    def __init__(self) -> None:
        self._held: queue.SimpleQueue[tuple[int, Event | None] | None] = queue.SimpleQueue()
        self._out: Deliver | None = None
        self._lock = threading.Lock()

    def deliver(self, rank: int, event: Event | None) -> None:
        with self._lock:
            if self._out is None:
                self._held.put((rank, event))
            else:
                self._out(rank, event)

    def next(self) -> tuple[int, Event | None] | None:
        """What a rank says while it starts; None: nobody waits for these ranks any more."""
        return self._held.get()

    def hang_up(self) -> None:
        """End the wait of `next`."""
        self._held.put(None)

    def open(self, out: Deliver) -> None:
        """From here on everything goes to `out`, first what was said meanwhile."""
        with self._lock:
            while not self._held.empty():
                if (said := self._held.get()) is not None:
                    out(*said)
            self._out = out


class Crew:
    """Ranks that can be replaced. `start` may run on a thread of its own; one at a time.

    Args:
        config: of one replica: its `data_parallel_size` is 1.
        replica: which one, of `num_replicas`.
        leader: where torchrun gave the ranks of several replicas and this process leads.
        say: takes what ranks say, from `attend` on; must not block.
    """

    def __init__(
        self, config: EngineConfig, say: Say, *, replica: int = 0, num_replicas: int = 1, leader: Leader | None = None
    ) -> None:
        self._config, self._say, self._leader = config, say, leader
        self._replica, self._num_replicas = replica, num_replicas
        self._ranks: launch.Ranks | None = None
        self._line = Line()
        self._stopped = False
        self.torchrun = torchrun.torchrun_rank()
        self.generation = 0

    @property
    def pids(self) -> list[int]:
        """Process ids; empty where the one rank is a thread of this process, and while ranks start."""
        ranks = self._ranks
        return list(ranks.pids) if ranks is not None else []

    def send(self, command: Command) -> None:
        ranks = self._ranks
        # The other ranks of torchrun hear of it from rank 0.
        if ranks is not None and self.torchrun in (None, 0):
            ranks.send(command)

    def retire(self) -> None:
        """Whatever these ranks still say is history."""
        self.generation += 1

    def start(self) -> ModelInfo:
        """Start ranks, in place of those that are there, and wait until all are ready. Then call `attend`.

        Raises:
            ModelError, InvalidConfigError: the user's to mend.
            EngineError: ranks died `MAX_STARTS` times, or `stop` was called.
        """
        try:
            return self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> ModelInfo:
        problem = ""
        for _ in range(self._max_starts):
            self.kill()
            if self._stopped:
                raise EngineError(_CLOSED)
            self.retire()
            self._line = line = Line()
            try:
                self._ranks = self._launch(line.deliver)
                info, problem = self._await_ready(line)
            except (EngineError, EOFError, OSError) as error:
                problem = f"the ranks could not be started ({one_line(error)})."
                continue
            if info is not None:
                return info
        raise EngineError(problem)

    @property
    def _max_starts(self) -> int:
        """The processes of several replicas under torchrun meet once."""
        return 1 if self.torchrun is not None and self._num_replicas > 1 else MAX_STARTS

    def attend(self) -> None:
        """From here on what the ranks say goes to the client, first what they said since they are ready."""
        generation = self.generation
        self._line.open(lambda rank, event: self._say(generation, rank, event))

    def stop(self) -> None:
        """Ask the ranks to end; those that are just starting are not waited for."""
        self._stopped = True
        self.retire()
        self._line.hang_up()
        self.send(Command(stop=True))

    def join(self) -> None:
        """Wait a while for ranks that were asked to end, then end them."""
        ranks = self._ranks
        if ranks is not None:
            ranks.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.kill()
            ranks.join(timeout=10)

    def _await_ready(self, line: Line) -> tuple[ModelInfo | None, str]:
        """What was loaded, or why nothing was."""
        size = self._config.parallel_config.world_size
        own = self.torchrun if self._leader is None else None
        waiting = set(range(size)) if own is None else {own % size}
        while True:
            said = None if self._stopped else line.next()
            if said is None:
                return None, _CLOSED
            rank, event = said
            if isinstance(event, Ready):
                waiting.discard(rank)
                if not waiting:
                    return event.info, ""
            elif isinstance(event, Failed) and event.by_user:
                raise (InvalidConfigError if event.by_settings else ModelError)(event.error)
            elif event is None or isinstance(event, Failed):
                return None, f"rank {rank} " + (f"failed: {event.error}" if event else "died while it started")

    def _launch(self, deliver: Deliver) -> launch.Ranks:
        if self._config.distributed_executor_backend == "ray":
            from denoised.runtime import ray_ranks

            return ray_ranks.start(self._config, deliver, num_replicas=self._num_replicas)
        if self.torchrun is not None:
            return self._launch_under_torchrun(deliver)
        if self._config.parallel_config.world_size == self._num_replicas == 1:
            spec = RankSpec(config=self._config, rank=0, local_rank=0, world_size=1, local_world_size=1)
            return launch.ThreadRank(spec, deliver)
        host = launch.shared_host()
        return host.fork(self._config, deliver, replica=self._replica, num_replicas=self._num_replicas)

    def _launch_under_torchrun(self, deliver: Deliver) -> launch.Ranks:
        if self._leader is not None:
            return self._leader.ranks(self._replica, deliver)
        if self._num_replicas > 1:
            return Follower(self._config, deliver)
        return launch.ThreadRank(torchrun.rank_spec(self._config), deliver)
