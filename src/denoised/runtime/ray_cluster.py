"""The Ray cluster: connecting to it, what its nodes have, and places for ranks. Knows nothing of models or requests.

A rank takes one unit: a GPU if the cluster has any, else a CPU.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, one_line

# Seconds that units may take to get free: those of ranks that just ended, as a rule.
PATIENCE = 30.0
# Seconds that a cluster's address may take to take a call.
REACH = 10.0


def connect() -> None:
    """The cluster of this process, or one that runs here or at RAY_ADDRESS; else one of this machine alone, which ends
    with this process.

    Raises:
        InvalidConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        return
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given not in ("auto", "local"):
        _reach(given)
    try:
        ray.init(address=given, logging_level="warning")
    except ConnectionError:
        if given != "auto":
            raise
        ray.init(address="local", include_dashboard=False, logging_level="warning")


def _reach(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except (OSError, ValueError) as error:
        raise InvalidConfigError(
            f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({one_line(error)}); start one, or unset it."
        ) from error


def nodes() -> list[tuple[str, dict[str, float]]]:
    """Address and units of each node that is alive."""
    return [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def unit() -> str:
    """What a rank takes one of."""
    return "GPU" if any(has.get("GPU", 0) >= 1 for _, has in nodes()) else "CPU"


def require(config: EngineConfig) -> None:
    """Refuse degrees that the cluster can never place.

    Raises:
        InvalidConfigError: with the numbers.
    """
    problem = _lack(config.parallel_config.world_size, unit())
    if problem is not None:
        raise InvalidConfigError(f"{config.parallel_config.formula()}: {problem}")


def _lack(count: int, kind: str) -> str | None:
    """Why so many ranks never fit; None if they do."""
    each = [(address, int(has.get(kind, 0))) for address, has in nodes()]
    total = sum(number for _, number in each)
    if total >= count:
        return None
    table = ", ".join(f"{address} has {number}" for address, number in each)
    return (
        f"{count} ranks need {count} {kind}s, and the nodes of the Ray cluster have {total} ({table}); lower a "
        "degree, or add nodes with `ray start`."
    )


def reserve(count: int) -> Any:
    """A placement group with one bundle a rank, few nodes preferred. Its resources are there when this returns.

    Raises:
        InvalidConfigError: they are not, or not in time.
    """
    kind, deadline = unit(), time.monotonic() + PATIENCE
    group = placement_group([{kind: 1}] * count, strategy="PACK")
    try:
        while not group.wait(timeout_seconds=1):
            check(count, kind)
            if time.monotonic() > deadline:
                raise InvalidConfigError(_busy(count, kind))
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def check(count: int, kind: str) -> None:
    """Notice nodes that have gone.

    Raises:
        InvalidConfigError: what is left has no place for so many ranks.
    """
    problem = _lack(count, kind)
    if problem is not None:
        raise InvalidConfigError(problem)


def _busy(count: int, kind: str) -> str:
    free = int(ray.available_resources().get(kind, 0))
    total = int(ray.cluster_resources().get(kind, 0))
    return (
        f"{count} ranks need {count} {kind}s, and {free} of the Ray cluster's {total} are free after "
        f"{PATIENCE:.0f} seconds; end what else runs there, or lower a degree."
    )
