"""The replicas of an engine: a crew of ranks each, started side by side, restarted alone, ended together.

Knows nothing of requests: the scheduler deals them, the client sends them. One replica is the usual case.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.runtime import launch
from denoised.runtime.crew import Crew, Say
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Command, Event

# Seconds that ranks which are just being started may hold up the end.
PATIENCE = 30.0

Listen = Callable[[int, int, int, Event | None], None]
"""Takes a replica, a generation of its ranks, a rank, and what that rank says; None: it is gone."""


class Replicas:
    """Crews by number. `listen` is called on their threads and must not block.

    Raises:
        InvalidConfigError: several replicas under torchrun, whose ranks are one replica.
    """

    def __init__(self, config: EngineConfig, listen: Listen) -> None:
        count = config.parallel_config.data_parallel_size
        self.torchrun = launch.torchrun_rank()
        if count > 1 and self.torchrun is not None:
            raise InvalidConfigError(
                f"data_parallel_size={count}: the ranks of one torchrun are one replica; "
                "start a torchrun for each replica, or run without torchrun."
            )
        own = one_replica(config)
        self.crews = [
            Crew(own, _numbered(listen, number), replica=number, num_replicas=count) for number in range(count)
        ]
        self._starting: list[threading.Thread] = []

    def start(self) -> ModelInfo:
        """Start all, and wait until all are ready; what they loaded.

        Raises:
            ModelError, InvalidConfigError, EngineError: as `Crew.start`, of the first replica that cannot.
        """
        problems: dict[int, BaseException] = {}

        def ended(replica: int, problem: Exception | None) -> None:
            if problem is not None:
                problems[replica] = problem

        others = [self._aside(replica, ended) for replica in range(1, len(self.crews))]
        info = self.crews[0].start()
        for thread in others:
            thread.join()
        for _, problem in sorted(problems.items()):
            raise problem
        for crew in self.crews:
            crew.attend()
        return info

    def restart(self, replica: int, ended: Callable[[int, Exception | None], None]) -> None:
        """Start a replica's ranks anew while the others go on; then `ended(replica, problem)`, on another thread.

        Without a problem its crew waits for `attend`.
        """
        self.crews[replica].retire()
        self._aside(replica, ended)

    def _aside(self, replica: int, ended: Callable[[int, Exception | None], None]) -> threading.Thread:
        def main() -> None:
            problem: Exception | None = None
            try:
                self.crews[replica].start()
            except Exception as error:
                problem = error
            ended(replica, problem)

        thread = threading.Thread(target=main, name=f"replica-{replica}-start", daemon=True)
        self._starting = [other for other in self._starting if other.is_alive()] + [thread]
        thread.start()
        return thread

    def send(self, command: Command) -> None:
        """To every replica."""
        for crew in self.crews:
            crew.send(command)

    def stop(self) -> None:
        """Ask all ranks to end; whatever they still say is history."""
        for crew in self.crews:
            crew.stop()

    def join(self) -> None:
        """Wait a while for ranks that were asked to end, then end them."""
        for thread in self._starting:
            thread.join(timeout=PATIENCE)
        for crew in self.crews:
            crew.join()


def one_replica(config: EngineConfig) -> EngineConfig:
    """The configuration of one replica by itself."""
    parallel = dataclasses.replace(config.parallel_config, data_parallel_size=1)
    return dataclasses.replace(config, parallel_config=parallel)


def _numbered(listen: Listen, replica: int) -> Say:
    return lambda generation, rank, event: listen(replica, generation, rank, event)


class Answers:
    """What all replicas answer to one question; `done` gets it once, when each has answered or is gone."""

    def __init__(self, replicas: list[int], done: Callable[[list[str]], None]) -> None:
        self.missing, self._done = replicas, done
        self._answers: list[str] = []
        self._end_if_complete()

    def add(self, replica: int, answers: list[str]) -> None:
        """A replica's answer; nothing if it is gone."""
        if replica in self.missing:
            self.missing = [other for other in self.missing if other != replica]
            self._answers += answers
            self._end_if_complete()

    def _end_if_complete(self) -> None:
        if not self.missing:
            self._done(self._answers)
