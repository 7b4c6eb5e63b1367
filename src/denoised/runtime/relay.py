"""Several replicas under torchrun: global rank 0 leads, the other processes follow.

The leader's client deals requests to replicas, as it does elsewhere. Every process runs its own copy of the user's
program, which wants all outputs: the leader tells the followers all that it tells its own program. Messages travel
over a socket of each follower to the leader:

    to the leader     the follower's global rank, then what its rank says; None: that rank has ended
    to the follower   Commands for its rank, where that is the first of its replica; and events of all requests
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener

from denoised.config import EngineConfig
from denoised.runtime import torchrun
from denoised.runtime.launch import ThreadRank, events
from denoised.runtime.protocol import Command, Deliver, Event, Failed, PickleChannel, Ready, pack

_engines = itertools.count()
"""Engines of this process so far; equal in all processes, since their programs are."""


class Leader:
    """Global rank 0's end: the ranks of all replicas. Where it listens, and the key, are in torchrun's store.

    config: of one replica.
    """

    def __init__(self, config: EngineConfig, num_replicas: int) -> None:
        self._config, self._num_replicas = config, num_replicas
        self._size = config.parallel_config.world_size
        self._delivers: dict[int, Deliver] = {}
        self._channels: dict[int, PickleChannel] = {}
        self._own: ThreadRank | None = None
        self._lock = threading.Lock()
        # Nodes reach each other by whatever interface they have; who lacks the key is turned away.
        host = "127.0.0.1" if torchrun.on_one_node() else ""
        key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET", backlog=num_replicas * self._size, authkey=key)
        self._readers: dict[int, threading.Thread] = {}
        torchrun.store().set(_name(), f"{host or torchrun.master()} {self._listener.address[1]} {key.hex()}")

    def ranks(self, replica: int, deliver: Deliver) -> ReplicaRanks:
        """The ranks of a replica. Those of other processes are let in when all replicas were asked for."""
        with self._lock:
            self._delivers[replica] = deliver
            if replica == 0:
                self._own = ThreadRank(torchrun.rank_spec(self._config), deliver)
            if len(self._delivers) == self._num_replicas:
                threading.Thread(target=self._accept_all, name="denoised-relay", daemon=True).start()
        return ReplicaRanks(self, replica)

    def _accept_all(self) -> None:
        while len(self._channels) < self._num_replicas * self._size - 1:
            try:
                channel = PickleChannel(self._listener.accept())
                rank = channel.recv()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody hung up, or was nobody of ours
            except OSError:
                return  # the listener is closed
            reader = threading.Thread(target=self._read, args=(rank, channel), name=f"rank-{rank}-events", daemon=True)
            with self._lock:
                self._channels[rank], self._readers[rank] = channel, reader
            reader.start()
        self._listener.close()

    def _read(self, rank: int, channel: PickleChannel) -> None:
        replica, place = divmod(rank, self._size)
        for event in events(channel):
            if event is None:
                break
            self._delivers[replica](place, event)
        self._delivers[replica](place, None)

    def send(self, replica: int, command: Command) -> None:
        """To the first rank of a replica."""
        if replica == 0:
            if self._own is not None:
                self._own.send(command)
        else:
            self._tell(replica * self._size, pack(command))

    def echo(self, event: Event) -> None:
        """To the programs of all other processes."""
        raw = pack(event)
        for rank in list(self._channels):
            self._tell(rank, raw)

    def _tell(self, rank: int, raw: bytes) -> None:
        with self._lock, contextlib.suppress(OSError, KeyError):  # its reader reports a process that is gone
            self._channels[rank].send_packed(raw)

    def join(self, replica: int, timeout: float) -> None:
        """Wait for the ranks of a replica to end."""
        deadline = time.monotonic() + timeout
        if replica == 0 and self._own is not None:
            self._own.join(timeout)
        for rank, reader in list(self._readers.items()):
            if rank // self._size == replica:
                reader.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Hang up: followers then know that nothing more comes."""
        self._listener.close()
        with self._lock:
            for rank, channel in self._channels.items():
                if not self._readers[rank].is_alive():  # never under a reader's feet
                    channel.close()


class ReplicaRanks:
    """The ranks of one replica, as the leader has them."""

    pids: list[int] = []

    def __init__(self, leader: Leader, replica: int) -> None:
        self._leader, self._replica = leader, replica

    def send(self, command: Command) -> None:
        self._leader.send(self._replica, command)

    def kill(self) -> None:
        """Processes are torchrun's to end; the rank is asked to."""
        self.send(Command(stop=True))

    def join(self, timeout: float) -> None:
        self._leader.join(self._replica, timeout)


class Follower:
    """A process that follows: its rank, and what the leader tells of all requests, as that rank's events."""

    pids: list[int] = []

    def __init__(self, config: EngineConfig, deliver: Deliver) -> None:
        self._deliver, self._ready = deliver, False
        spec = torchrun.rank_spec(config)
        host, port, key = torchrun.store().get(_name()).decode().split()
        self._channel = PickleChannel(Client((host, int(port)), family="AF_INET", authkey=bytes.fromhex(key)))
        self._channel.send(torchrun.torchrun_rank())
        self._rank = ThreadRank(spec, self._heard)
        self._reader = threading.Thread(target=self._read, args=(spec.rank,), name="denoised-relay", daemon=True)
        self._reader.start()

    def _heard(self, rank: int, event: Event | None) -> None:
        """The leader acts on what a rank says; this program wants to know whether it started."""
        with contextlib.suppress(OSError):
            self._channel.send(event)
        if not self._ready and (event is None or isinstance(event, Ready | Failed)):
            self._deliver(rank, event)
        self._ready = self._ready or isinstance(event, Ready)

    def _read(self, rank: int) -> None:
        for item in events(self._channel):
            if isinstance(item, Command):
                self._rank.send(item)
            else:
                self._deliver(rank, item)
        self._rank.kill()  # nobody is left who gives it work
        self._deliver(rank, None)

    def send(self, command: Command) -> None:
        raise AssertionError("the leader sends commands")

    def kill(self) -> None:
        """Nothing: the leader's program may still have work for this rank, which ends with it or with the process."""

    def join(self, timeout: float) -> None:
        self._rank.join(timeout)


def _name() -> str:
    return f"denoised-relay-{next(_engines)}"
