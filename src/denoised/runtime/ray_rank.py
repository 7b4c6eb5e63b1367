"""A rank as an actor of Ray, on whatever node it was placed. The other end is `ray_ranks.py`.

Imports neither torch nor diffusers itself, so that an actor that cannot start says so at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import socket
import struct
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ray

from denoised.errors import one_line
from denoised.runtime.launch import ThreadRank
from denoised.runtime.protocol import Event, Failed, RankSpec, pack

# Linux' ioctl that gives an interface's address (linux/sockios.h).
_SIOCGIFADDR = 0x8915
END = b""
"""The last message of a rank."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor runs. `node` is Ray's name of it: several may have one address in tests."""

    node: str
    address: str
    pid: int
    version: str


class Rank:
    """The rank runs on a thread of its own; Ray calls `send` and `listen` each on another."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._address = ray.util.get_node_ip_address()
        self._rank: ThreadRank | None = None

    def place(self) -> Place:
        node = ray.get_runtime_context().get_node_id()
        return Place(node=node, address=self._address, pid=os.getpid(), version=version("denoised"))

    def rendezvous(self) -> str:
        """An init method that this rank can offer to the others."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{self._address}:{probe.getsockname()[1]}"

    def start(self, raw: bytes) -> None:
        """Run the rank of a packed RankSpec, whose `local_rank` is not known there. Nobody waits for this call: errors
        go the way of events."""
        try:
            spec: RankSpec = pickle.loads(raw)
            problem = self._unfit(spec)
            if problem is None:
                self._run(spec)
            else:
                self._heard(spec.rank, Failed(error=problem, by_user=True))
        except Exception as error:
            self._heard(-1, Failed(error=one_line(error)))

    def _run(self, spec: RankSpec) -> None:
        if (interface := interface_of(self._address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else gloo believes the host's name
        self._rank = ThreadRank(dataclasses.replace(spec, local_rank=_device_index()), self._heard)

    def _unfit(self, spec: RankSpec) -> str | None:
        """What this node lacks."""
        model = spec.config.model
        if model.startswith(("/", "~")) and not Path(model).expanduser().is_dir():
            return f"there is no folder {model}; copy the model there, or put it where all nodes read it."
        if not ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this rank was given a CPU
            return None
        import torch

        return None if torch.cuda.is_available() else "its torch cannot use its GPUs; install one that can."

    def _heard(self, rank: int, event: Event | None) -> None:
        if isinstance(event, Failed) and not event.by_settings:
            event = dataclasses.replace(event, error=f"node {self._address}: {event.error}")
        self._said.put(END if event is None else pack(event))

    def send(self, raw: bytes) -> None:
        """A packed command."""
        if self._rank is not None:
            self._rank.send(pickle.loads(raw))

    def listen(self) -> list[bytes]:
        """What the rank has said since the last time, packed; waits until there is something."""
        said = [self._said.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                said.append(self._said.get_nowait())
        return said


def _device_index() -> int:
    """Of the GPU that Ray gave to this actor, among those that torch sees here."""
    given = [str(number) for number in ray.get_gpu_ids()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not given or given[0] in visible:
        return visible.index(given[0]) if given else 0
    return int(given[0])


def interface_of(address: str) -> str | None:
    """The network interface with this address, or None where that cannot be found out."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                raw = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(raw[20:24]) == address:
                    return name
    return None
