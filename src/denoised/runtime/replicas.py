"""The replicas of an engine: a crew of ranks each, started side by side, restarted alone, ended together.

Knows nothing of requests: the scheduler deals them, the client sends them. One replica is the usual case.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from denoised.config import EngineConfig
from denoised.runtime import torchrun
from denoised.runtime.crew import Crew, Say
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Command, Event
from denoised.runtime.relay import Leader

# Seconds that ranks which are just being started may hold up the end.
PATIENCE = 30.0

Listen = Callable[[int, int, int, Event | None], None]
"""Takes a replica, a generation of its ranks, a rank, and what that rank says; None: it is gone."""


class Replicas:
    """Crews by number. `listen` is called on their threads and must not block.

    Under torchrun every process has a client. With several replicas, that of global rank 0 has all crews; the others
    follow it: their one crew is the own rank, and events of all requests come as that crew's.

    Raises:
        InvalidConfigError: torchrun or the Ray cluster has other ranks than the degrees need.
    """

    def __init__(self, config: EngineConfig, listen: Listen) -> None:
        count = config.parallel_config.data_parallel_size
        self.torchrun = torchrun.torchrun_rank()
        self.follows = count > 1 and self.torchrun not in (None, 0)
        _check_world(config)
        own = one_replica(config)
        self._leader = Leader(own, count) if count > 1 and self.torchrun == 0 else None
        self.crews = [
            Crew(own, _numbered(listen, number), replica=number, num_replicas=count, leader=self._leader)
            for number in range(1 if self.follows else count)
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

    def echo(self, event: Event) -> None:
        """To the programs that follow this one."""
        if self._leader is not None:
            self._leader.echo(event)

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
        if self._leader is not None:
            self._leader.close()


def one_replica(config: EngineConfig) -> EngineConfig:
    """The configuration of one replica by itself."""
    parallel = dataclasses.replace(config.parallel_config, data_parallel_size=1)
    return dataclasses.replace(config, parallel_config=parallel)


def _check_world(config: EngineConfig) -> None:
    if config.distributed_executor_backend == "ray":
        from denoised.runtime import ray_cluster

        ray_cluster.connect()
        ray_cluster.require(config)
    elif torchrun.torchrun_rank() is not None:
        torchrun.check_world(config)


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
