"""What the client and the ranks say to each other, as plain data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from denoised.config import EngineConfig
from denoised.request import OmniRequestOutput, Progress, Request
from denoised.runtime.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Command:
    """What rank 0 tells all ranks to do between ticks: exactly one field is set. `stop_profile` is a folder."""

    admit: Request | None = None
    cancel: str | None = None
    start_profile: bool = False
    stop_profile: str | None = None
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A rank has loaded its model."""

    info: ModelInfo
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A rank cannot go on. `by_user` marks errors of the settings or the model, which a restart does not mend;
    `by_settings` those of the settings."""

    error: str
    by_user: bool = False
    by_settings: bool = False


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """All ranks have written their traces."""

    paths: list[str]


Event = Progress | OmniRequestOutput | Ready | Failed | Profiled


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """One rank of one engine. `rendezvous` is the init method of its process group; None where there is one rank;
    `import_path` is where the client finds modules, for those that `config.plugins` names."""

    config: EngineConfig
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    rendezvous: str | None = None
    import_path: tuple[str, ...] = ()


class Channel(Protocol):
    """A rank's end of its connection to the client."""

    def send(self, event: Any, /) -> None: ...

    def recv(self) -> Any: ...

    def poll(self, timeout: float = ..., /) -> bool: ...


def pack(item: Any) -> bytes:
    """`item` as a PickleChannel sends it."""
    return pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)


class PickleChannel:
    """A connection between our own processes that copies what it sends.

    `Connection.send` would hand tensors over as shared file descriptors, which die with the process that made them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, item: Any) -> None:
        self.send_packed(pack(item))

    def send_packed(self, raw: bytes) -> None:
        self._connection.send_bytes(raw)

    def recv(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def poll(self, timeout: float = 0.0) -> bool:
        return self._connection.poll(timeout)

    def close(self) -> None:
        self._connection.close()


Deliver = Callable[[int, Event | None], None]
"""Takes a rank's event; None means that the rank is gone."""
