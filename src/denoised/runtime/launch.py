"""Starting ranks on this machine: a thread of this process for one rank, or forked processes. `relay.py` and
`ray_ranks.py` have ranks that others start, with the same interface.

`Ranks.send` reaches rank 0; events of all ranks arrive at `deliver(rank, event)`, and `deliver(rank, None)` says that
a rank is gone. A `Ranks` is used once: whoever wants ranks again starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any, Protocol

from denoised.config import EngineConfig
from denoised.errors import EngineError
from denoised.runtime.protocol import Command, Deliver, PickleChannel, RankSpec, pack

# glibc reads these at start; runtime/env.py says why.
KEEP_PAGES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


class Ranks(Protocol):
    """Running ranks."""

    @property
    def pids(self) -> list[int]: ...

    def send(self, command: Command) -> None: ...

    def kill(self) -> None: ...

    def join(self, timeout: float) -> None: ...


class ThreadRank:
    """The one rank of an engine without parallelism, or this process's rank under torchrun, on a thread."""

    def __init__(self, spec: RankSpec, deliver: Deliver) -> None:
        from denoised.runtime.worker import run_rank

        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._next: Command | None = None
        self._spec, self._deliver = spec, deliver

        def main() -> None:
            try:
                run_rank(spec, self)
            finally:
                deliver(spec.rank, None)

        self._thread = threading.Thread(target=main, name=f"rank-{spec.rank}", daemon=True)
        self._thread.start()

    pids: list[int] = []

    def send(self, item: Any) -> None:
        """A command from the client; an event from the rank. Each side sends only its own kind."""
        if isinstance(item, Command):
            self._commands.put(item)
        else:
            self._deliver(self._spec.rank, item)

    def poll(self, timeout: float = 0.0) -> bool:
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self._commands.get(timeout=timeout) if timeout else self._commands.get_nowait()
        return self._next is not None

    def recv(self) -> Command:
        command, self._next = self._next, None
        assert command is not None, "poll() before recv()"
        return command

    def kill(self) -> None:
        self._commands.put(Command(stop=True))

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)


class Host:
    """The process that forks ranks. It outlives them, so that a restart is quick."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="denoised-")
        self._address = str(Path(self._folder.name) / "client.sock")
        key = secrets.token_bytes(32)
        self._listener = Listener(self._address, family="AF_UNIX", backlog=64, authkey=key)
        environment = {**os.environ, "DENOISED_HOST_KEY": key.hex(), "OMP_NUM_THREADS": "1"}
        # Asking the CUDA driver for devices would leave the forked ranks without CUDA; NVML may be asked.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if environment.get("DENOISED_KEEP_PAGES", "1") != "0":
            environment = {**KEEP_PAGES, **environment}
        if sys.platform.startswith("linux"):
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # A session of its own: Ctrl-C reaches the client alone, which then stops the ranks in order.
        command = [sys.executable, "-m", "denoised.runtime.host", self._address]
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        self._accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._accept_all, name="denoised-accept", daemon=True).start()
        self._connection = self._accept(())
        self._generation = 0
        self._lock = threading.Lock()

    def _accept_all(self) -> None:
        """One thread takes all calls, so that none is lost to somebody who has given up waiting."""
        while True:
            try:
                self._accepted.put(self._listener.accept())
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody hung up
            except OSError:
                return  # the listener is closed

    def _accept(self, pids: Sequence[int]) -> PickleChannel:
        """The next connection; notices a host or a rank that ends instead of calling."""
        while True:
            with contextlib.suppress(queue.Empty):
                return PickleChannel(self._accepted.get(timeout=0.5))
            if self._process.poll() is not None:
                raise EngineError(f"the process that starts ranks ended with code {self._process.returncode}.")
            for rank, pid in enumerate(pids):
                if not _alive(pid):
                    raise EngineError(f"rank {rank} died before it was connected.")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, config: EngineConfig, deliver: Deliver, *, replica: int = 0, num_replicas: int = 1) -> ForkedRanks:
        """Start all ranks of `config`, which is one replica's."""
        with self._lock:
            return self._fork(config, deliver, replica, num_replicas)

    def _fork(self, config: EngineConfig, deliver: Deliver, replica: int, num_replicas: int) -> ForkedRanks:
        self._generation += 1
        rendezvous = f"file://{self._folder.name}/store-{self._generation}"
        pids: list[int] = []
        for spec in rank_specs(config, rendezvous, replica, num_replicas):
            self._connection.send(spec)
            pids.append(self._connection.recv())
        channels: dict[int, PickleChannel] = {}
        try:
            while len(channels) < len(pids):
                channel = self._accept(pids)
                with contextlib.suppress(EOFError):  # it died after it called; its pid tells
                    group, rank = channel.recv()
                    if group == rendezvous:  # not a late rank of a group that was given up
                        channels[rank] = channel
        except EngineError:
            _kill(pids)
            raise
        return ForkedRanks(pids=pids, channels=channels, deliver=deliver, store=Path(rendezvous[len("file://") :]))

    def close(self) -> None:
        """End the host, and with it all its ranks."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        if self.alive:
            self._process.kill()
            self._process.wait()
        self._listener.close()
        self._folder.cleanup()


def rank_specs(config: EngineConfig, rendezvous: str, replica: int, num_replicas: int) -> list[RankSpec]:
    """All ranks of one of `num_replicas` replicas on this node, whose devices they take one after another."""
    world_size = config.parallel_config.world_size
    return [
        RankSpec(
            config=config,
            rank=rank,
            local_rank=replica * world_size + rank,
            world_size=world_size,
            local_world_size=num_replicas * world_size,
            rendezvous=rendezvous,
            import_path=tuple(sys.path),
        )
        for rank in range(world_size)
    ]


_shared: Host | None = None
_shared_lock = threading.Lock()


def shared_host() -> Host:
    """This process's host, started on first use and again if it died; ends with the process."""
    global _shared
    with _shared_lock:
        if _shared is None or not _shared.alive:
            _shared = Host()
            atexit.register(_shared.close)
        return _shared


class ForkedRanks:
    """Ranks in processes of this node, each with a reader thread here. `store`: where they met, a file that those
    leave which are killed."""

    def __init__(
        self, *, pids: list[int], channels: dict[int, PickleChannel], deliver: Deliver, store: Path | None = None
    ) -> None:
        self.pids, self._channels, self._deliver, self._store = pids, channels, deliver, store
        self._threads = [
            threading.Thread(target=self._read, args=(rank,), name=f"rank-{rank}-events", daemon=True)
            for rank in channels
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, rank: int) -> None:
        for event in events(self._channels[rank]):
            self._deliver(rank, event)
        self._deliver(rank, None)

    def send(self, command: Command) -> None:
        raw = pack(command)  # an error here is the request's
        with contextlib.suppress(OSError):  # the reader thread reports a rank that is gone
            self._channels[0].send_packed(raw)

    def kill(self) -> None:
        _kill(self.pids)

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):  # never under a reader's feet
            for channel in self._channels.values():
                channel.close()
            if self._store is not None:
                self._store.unlink(missing_ok=True)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def events(channel: PickleChannel) -> Iterator[Any]:
    """What comes, until the other side is gone."""
    while True:
        try:
            yield channel.recv()
        except (EOFError, OSError):
            return
