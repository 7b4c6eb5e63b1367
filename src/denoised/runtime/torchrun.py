"""The place of this process under torchrun, and how the processes of one torchrun find each other.

Knows the environment that torchrun gives and its store of keys; not what processes say to each other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlparse

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.runtime.protocol import RankSpec

# torch finds the group of one of several replicas by a URL of this scheme.
SCHEME = "denoised-replica"


def torchrun_rank() -> int | None:
    """This process's rank among all that torchrun started, or None elsewhere."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def world_size() -> int:
    """Processes that torchrun started, on all nodes."""
    return int(os.environ["WORLD_SIZE"])


def on_one_node() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) == world_size()


def master() -> str:
    """The host of rank 0, as the other nodes reach it."""
    return os.environ["MASTER_ADDR"]


def check_world(config: EngineConfig) -> None:
    """Refuse degrees that are not those of torchrun.

    Raises:
        InvalidConfigError: torchrun gave another number of ranks than the degrees need.
    """
    if world_size() != config.parallel_config.world_size:
        raise InvalidConfigError(
            f"torchrun gave {world_size()} ranks and the degrees need {config.parallel_config.formula()}; "
            "change --nproc-per-node or a degree."
        )


def rank_spec(config: EngineConfig) -> RankSpec:
    """This process's rank. `config` is of one replica; replicas take ranks one after another."""
    size = config.parallel_config.world_size
    replica, rank = divmod(int(os.environ["RANK"]), size)
    return RankSpec(
        config=config,
        rank=rank,
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size())),
        rendezvous="env://" if size == world_size() else _url(replica),
    )


def _url(replica: int) -> str:
    _register()
    return f"{SCHEME}://{replica}"


@functools.cache
def _register() -> None:
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(SCHEME, _meet)  # type: ignore[no-untyped-call]


def _meet(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """torch's handler of our scheme: the store that torchrun gives, with keys of the replica's own.

    torch's own `tcp://` starts no store under torchrun, and its `env://` has one group, of everybody.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    parts = urlparse(url)
    numbers = parse_qs(parts.query)
    yield PrefixStore(f"{SCHEME}-{parts.netloc}", store()), int(numbers["rank"][0]), int(numbers["world_size"][0])


@functools.cache
def store() -> Any:
    """What torchrun gives its processes to find each other by: a table of keys that all can read."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]
