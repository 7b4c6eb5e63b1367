"""Gloo ranks for tests: processes that are started once and reused, so that a test on n ranks costs milliseconds.

    def body(rank: int, world_size: int, scale: float) -> float: ...     # at the top level of a module

    results = run_on_ranks(body, 2, 3.0)                                 # [result of rank 0, result of rank 1]

Each call has a process group of its own. The processes live on: modules stay imported, and the environment is that of
the first call, so a body that changes global state must restore it.

Pieces: `run_on_ranks` drives a `_Pool` of `_Rank` handles on this side; `_serve` is the loop on the other side. A rank
keeps its process group until all have reported, because closing it early would cut off ranks that still receive; a
rank that fails closes it at once, so that the others do not wait for it.
"""

import atexit
import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the server that ranks are forked from.
PRELOAD = ["torch", "torch.distributed", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils"]
# How long ranks may go on after one has failed: long enough to notice it and to report what it did to them.
GRACE_SECONDS = 5.0

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What the caller asks of one rank. `call` is pickled apart, so that failing to import the body is its error."""

    rank: int
    world_size: int
    store: str
    timeout: float
    path: tuple[str, ...]
    call: bytes


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What a rank answers. The time tells the first error from those that it caused on other ranks."""

    value: Any = None
    error: BaseException | None = None
    time: float = field(default_factory=time.monotonic)


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, fresh: bool = False
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on so many gloo ranks, one torch thread each; the results in order of rank.

    `fn` must be importable; arguments and results travel as pickles. fresh: on processes that have run nothing else.

    Raises:
        The first exception of a rank, with its traceback as a note, and what then failed elsewhere as further notes.
        TimeoutError: ranks did not end in time; notes hold their stacks. The processes are replaced.
        RuntimeError: a rank's process died. The processes are replaced.
    """
    pool = _Pool() if fresh else _pool
    try:
        outcomes = pool.run(pickle.dumps((fn, args)), world_size, timeout)
    except BaseException:
        pool.kill()  # ranks in an unknown state are of no use to the next test
        raise
    if fresh:
        pool.kill()
    error = _first_error(outcomes)
    if error is not None:
        raise error
    return [outcomes[rank].value for rank in range(world_size)]


def _first_error(outcomes: dict[int, _Outcome]) -> BaseException | None:
    """The earliest error, with the notes of all."""
    ordered = sorted(outcomes.values(), key=lambda outcome: outcome.time)
    errors = [outcome.error for outcome in ordered if outcome.error is not None]
    for note in [note for error in errors[1:] for note in error.__notes__]:
        errors[0].add_note(note)
    return errors[0] if errors else None


class _Rank:
    """This side of one process."""

    def __init__(self, index: int, stacks: Path) -> None:
        self.index, self.stacks = index, stacks
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, str(stacks)), name=f"rank{index}", daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        # Bytes, not `connection.send`, which would pass tensors as shared memory that lives no longer than the sender.
        self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> _Outcome:
        try:
            outcome: _Outcome = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(
                f"rank {self.index} died, exit code {self.process.exitcode}\n{self.stacks.read_text()}"
            ) from None
        return outcome

    def stack_text(self) -> str:
        """The stacks of all its threads now; also of a rank that hangs in C code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return f"stacks of rank {self.index}:\n{self.stacks.read_text()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()
        self.stacks.unlink(missing_ok=True)


class _Pool:
    """The processes; rank i of every call is process i. They are daemons: multiprocessing ends them with this one."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []

    def run(self, call: bytes, world_size: int, timeout: float) -> dict[int, _Outcome]:
        """The outcome of each rank."""
        self.grow(world_size)
        ranks = self.ranks[:world_size]
        path = tuple(sys.path)  # pytest adds to it as it goes
        # A file, not a port: a TCPStore that has just started leaves a client waiting for 5 s now and then.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            store = f"{folder}/store"
            for rank in ranks:
                rank.send(
                    _Task(rank=rank.index, world_size=world_size, store=store, timeout=timeout, path=path, call=call)
                )
            outcomes = self.collect(ranks, timeout)
            for rank in ranks:
                rank.send("close")
        return outcomes

    def grow(self, world_size: int) -> None:
        _context.set_forkserver_preload(PRELOAD)
        directory = Path(tempfile.gettempdir())
        for index in range(len(self.ranks), world_size):
            self.ranks.append(_Rank(index, directory / f"ranks-{os.getpid()}-{next(_serial)}.stacks"))

    def collect(self, ranks: list[_Rank], timeout: float) -> dict[int, _Outcome]:
        outcomes: dict[int, _Outcome] = {}
        deadline = time.monotonic() + timeout
        while late := [rank for rank in ranks if rank.index not in outcomes]:
            ready = wait([rank.connection for rank in late], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self.overdue(late, outcomes, timeout)
            outcomes |= {rank.index: rank.receive() for rank in late if rank.connection in ready}
            if any(outcome.error is not None for outcome in outcomes.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    def overdue(self, late: list[_Rank], outcomes: dict[int, _Outcome], timeout: float) -> BaseException:
        """The error that explains a wait that was too long: that of a failed rank, if there is one."""
        names = [rank.index for rank in late]
        error = _first_error(outcomes) or TimeoutError(f"ranks {names} did not end within {timeout} s")
        for rank in late:
            error.add_note(rank.stack_text())
        return error

    def kill(self) -> None:
        while self.ranks:
            self.ranks.pop().kill()


_pool = _Pool()
_serial = itertools.count()
atexit.register(_pool.kill)


def _serve(connection: Connection, stacks: str) -> None:
    """The life of a rank: tasks until the caller's end of the pipe closes."""
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends the ranks
        torch.set_num_threads(1)
        gc.freeze()  # what was imported stays: collecting after each call then costs nothing
        with contextlib.suppress(EOFError, OSError):
            while True:
                _answer(connection, pickle.loads(connection.recv_bytes()))


def _answer(connection: Connection, task: _Task) -> None:
    sys.path[:] = task.path
    outcome = _attempt(task)
    connection.send_bytes(_pickled(outcome))
    if outcome.error is not None:
        _close_group()
    assert pickle.loads(connection.recv_bytes()) == "close"
    _close_group()


def _attempt(task: _Task) -> _Outcome:
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(task.store, task.world_size),  # type: ignore[attr-defined]
            rank=task.rank,
            world_size=task.world_size,
            timeout=timedelta(seconds=task.timeout),
        )
        dist.barrier()  # a rank that fails before another has connected to it would leave that one connecting
        fn, args = pickle.loads(task.call)
        return _Outcome(value=fn(task.rank, task.world_size, *args))
    except BaseException as error:
        error.add_note(f"on rank {task.rank} of {task.world_size}:\n{traceback.format_exc()}")
        # Frames would keep process groups of the body alive, and with them the connections that others wait on.
        error.__context__ = error.__cause__ = error.__traceback__ = None
        return _Outcome(error=error)


def _pickled(outcome: _Outcome) -> bytes:
    """The outcome; if it cannot travel, a RuntimeError with its text and notes."""
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception as problem:
        lost = outcome.error or problem
        error = RuntimeError(f"{type(lost).__name__}: {lost}")
        for note in getattr(lost, "__notes__", ["this result cannot be pickled"]):
            error.add_note(note)
        return pickle.dumps(_Outcome(error=error, time=outcome.time))
    return data


def _close_group() -> None:
    boards = sys.modules.get("denoised.steps.boards")
    if boards is not None:
        boards.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
