"""What the client and the ranks say to each other, as plain data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from denoised.config import EngineConfig
from denoised.lora_request import Lora
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import Request
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.stats import Work


@dataclass(frozen=True, kw_only=True)
class Command:
    """What rank 0 tells all ranks to do between ticks: exactly one field is set. `stop_profile` is a folder."""

    admit: Request | None = None
    cancel: str | None = None
    start_profile: bool = False
    stop_profile: str | None = None
    load_lora: Lora | None = None
    unload_lora: Lora | None = None
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


@dataclass(frozen=True, kw_only=True)
class LoraDone:
    """All ranks have loaded or unloaded an adapter; `problem`: why they have not."""

    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step of a request takes. `seconds[k - 1]`: of ticks that give each of k requests like it one step;
    `share`: of the ranks' time, if it is alone: what it leaves idle others can have. `kind`: those of one share
    forwards, whatever their number of rows."""

    seconds: tuple[float, ...]
    share: float = 1.0
    kind: str = ""

    def demand(self, crowd: int) -> float:
        """Seconds of all ranks that a step of one of so many requests takes."""
        most = len(self.seconds)
        if crowd == 1:
            return self.seconds[0] * self.share
        return self.seconds[min(crowd, most) - 1] / min(crowd, most)


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """The ranks go on. Sent a few times a second, and before a tick that may take long.

    work: sums since these ranks started. costs: steps of the requests in flight, by id. expected: seconds that the
    next tick is predicted to take; None where something in it was never measured. loras, lora_mb: adapters in memory.
    """

    work: Work
    costs: dict[str, StepCost]
    expected: float | None
    memory_mb: float
    loras: int = 0
    lora_mb: float = 0.0


Event = Progress | Preview | Saved | OmniRequestOutput | Ready | Failed | Profiled | LoraDone | Ticked


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
