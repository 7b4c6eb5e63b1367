"""Ranks as actors of a Ray cluster, on one node or several. The other end is `ray_rank.py`.

Commands and events are calls of the actors, in bytes of our own; that a rank or its node is gone is told by the call
that waits for its events.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from denoised.config import EngineConfig
from denoised.errors import EngineError, InvalidConfigError, one_line
from denoised.runtime import ray_cluster
from denoised.runtime.protocol import Command, Deliver, RankSpec, pack
from denoised.runtime.ray_rank import END, Place, Rank

# Seconds that Ray may take for the processes of actors: a node's first ones are slow.
PATIENCE = 120.0


def start(config: EngineConfig, deliver: Deliver, *, num_replicas: int = 1) -> RayRanks:
    """Place and start all ranks of `config`, which is one replica's; neighbours on one node where possible.

    Raises:
        InvalidConfigError: the cluster has no place for them, or other software.
        EngineError: an actor could not be started.
    """
    count = config.parallel_config.world_size
    group = ray_cluster.reserve(count)
    actors: list[Any] = []
    try:
        actors = [_actor(group, bundle) for bundle in range(count)]
        places = _answers([actor.place.remote() for actor in actors], group)
        order = _order(places)
        actors, places = [actors[bundle] for bundle in order], [places[bundle] for bundle in order]
        _check_software(places)
        (rendezvous,) = _answers([actors[0].rendezvous.remote()], group)
        for actor, spec in zip(actors, _specs(config, places, rendezvous, num_replicas), strict=True):
            actor.start.remote(pack(spec))
    except BaseException:
        _end(actors, group)
        raise
    return RayRanks(actors=actors, places=places, group=group, deliver=deliver)


def _actor(group: Any, bundle: int) -> Any:
    """One thread for commands, which keeps their order, and one that waits for events."""
    unit = group.bundle_specs[bundle]
    threads = {"commands": 1, "events": 1}
    cls = ray.remote(num_cpus=unit.get("CPU", 0), num_gpus=unit.get("GPU", 0), concurrency_groups=threads)(Rank)
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    return cls.options(scheduling_strategy=place).remote()


def _answers(calls: list[Any], group: Any) -> list[Any]:
    """What actors of a placement group answer while they start.

    Raises:
        InvalidConfigError: nodes have gone, and there is no place any more.
        EngineError: an actor died, or does not answer.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        while len(ray.wait(calls, num_returns=len(calls), timeout=1)[0]) < len(calls) and time.monotonic() < deadline:
            ray_cluster.check(group.bundle_count, next(iter(group.bundle_specs[0])))
        return list(ray.get(calls, timeout=0))
    except RayError as error:
        raise EngineError(f"Ray could not start a rank: {one_line(error)}") from error


def _order(places: list[Place]) -> list[int]:
    """Bundles in the order of ranks: those of one node are neighbours. Ray deals bundles to nodes as it likes."""
    return sorted(range(len(places)), key=lambda bundle: places[bundle].node)


def _check_software(places: list[Place]) -> None:
    mine = version("denoised")
    for place in places:
        if place.version != mine:
            raise InvalidConfigError(
                f"node {place.address} has denoised {place.version} and this one {mine}; install the same everywhere."
            )


def _specs(config: EngineConfig, places: list[Place], rendezvous: str, num_replicas: int) -> list[RankSpec]:
    """`local_world_size` says how many share a node's cores; other replicas may be on any node."""
    neighbours = Counter(place.node for place in places)
    return [
        RankSpec(
            config=config,
            rank=rank,
            local_rank=0,
            world_size=len(places),
            local_world_size=neighbours[place.node] * num_replicas,
            rendezvous=rendezvous if len(places) > 1 else None,
            import_path=tuple(sys.path),
        )
        for rank, place in enumerate(places)
    ]


class RayRanks:
    """Running actors, in order of rank, each with a thread here that waits for what it says."""

    def __init__(self, *, actors: list[Any], places: list[Place], group: Any, deliver: Deliver) -> None:
        self.pids = [place.pid for place in places]
        self._actors, self._group, self._deliver = actors, group, deliver
        self._threads = [
            threading.Thread(target=self._read, args=(rank,), name=f"rank-{rank}-events", daemon=True)
            for rank in range(len(actors))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, rank: int) -> None:
        with contextlib.suppress(RayError):
            while True:
                for raw in ray.get(self._actors[rank].listen.options(concurrency_group="events").remote()):
                    if raw == END:
                        self._deliver(rank, None)
                        return
                    self._deliver(rank, pickle.loads(raw))
        self._deliver(rank, None)

    def send(self, command: Command) -> None:
        raw = pack(command)  # an error here is the request's
        with contextlib.suppress(RayError):  # the reader thread reports a rank that is gone
            self._actors[0].send.options(concurrency_group="commands").remote(raw)

    def kill(self) -> None:
        _end(self._actors, self._group)

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _end(actors: list[Any], group: Any) -> None:
    """Processes first: Ray gives their places back."""
    if not ray.is_initialized():
        return  # and with the connection, all of this job
    for actor in actors:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(actor)
    with contextlib.suppress(RayError):
        remove_placement_group(group)
