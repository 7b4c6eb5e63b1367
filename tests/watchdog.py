"""A run that takes too long ends in an error that shows where every rank and this process stood.

    outputs = within(60, omni.generate, prompts, params)

Ranks take part by calling `listen()`, which the plugin `tests.contract.rank_setup` does. Their stacks go to one file a
process, in a folder that `tests/conftest.py` makes and whose name ranks inherit. A rank that hangs in C code answers
too: the handler is C.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
FOLDER = "DENOISED_TEST_STACKS"
_files: list[Any] = []  # open for the life of the process: the handler writes to their descriptors


class HungError(AssertionError):
    """A run did not end in time; its text has the stacks."""


def listen() -> None:
    """In a rank: on SIGUSR1, write the stacks of all threads."""
    folder = os.environ.get(FOLDER)
    if folder and threading.current_thread() is threading.main_thread():
        _files.append(open(Path(folder) / str(os.getpid()), "w"))  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, _files[-1], all_threads=True)


def within(seconds: float, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function gives or raises.

    Raises:
        HungError: it did not end in time. The ranks and engines that it started have been ended.
    """
    before = _everything()
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((function(*args, **kwargs), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, name="watched", daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        text = stacks()
        _end(before)
        raise HungError(f"not done after {seconds} s\n{text}") from None
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def stacks() -> str:
    """The stacks of this process and of all listening processes below it."""
    with tempfile.TemporaryFile("w+") as own:
        faulthandler.dump_traceback(own, all_threads=True)
        own.seek(0)
        texts = [f"==== client, process {os.getpid()}\n{own.read()}"]
    return "\n".join([*texts, *(_stacks_of(*rank) for rank in sorted(_listening().items()))])


def _stacks_of(pid: int, file: Path) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    text, size = "", -1
    while len(text) != size:  # until it is written out; a stopped process writes nothing
        size = len(text)
        time.sleep(0.3)
        text = file.read_text()
    return f"==== rank, process {pid}\n{text or 'gives no stack: it is stopped or gone'}"


def _listening() -> dict[int, Path]:
    """Processes below this one that have called `listen`, and their files."""
    folder = Path(os.environ[FOLDER])
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    return {pid: folder / str(pid) for pid in pids if (folder / str(pid)).exists()}


def _everything() -> set[int]:
    """Identities of engines and pids of ranks that are there now."""
    return {id(each) for each in _engines()} | set(_listening())


def _engines() -> list[Any]:
    from denoised.runtime.client import Client
    from denoised.runtime.crew import Crew

    return [each for each in gc.get_objects() if type(each) in (Crew, Client)]


def _end(before: set[int]) -> None:
    """End what was started since: crews first, since a client that is being made waits for its crew."""
    new = [each for each in _engines() if id(each) not in before]
    for each in new:
        if hasattr(each, "generation"):
            each.stop()
    for pid in _listening().keys() - before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for each in new:
        if not hasattr(each, "generation") and hasattr(each, "_thread"):
            each.close()
