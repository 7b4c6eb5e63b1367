"""A function that can pause. Knows nothing of rows and stages."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator

import torch

from denoised.steps.ambient import Ambient
from denoised.steps.tally import counting, open_counts


class Abandoned(BaseException):
    """Unwinds a function that will not be resumed. Not an Exception, so that models do not catch it."""


class Lane:
    """`run()` on a thread of its own, never at the same time as whoever advances it.

    A thread and not a coroutine, because what torch keeps of a thread, and what features do, stays with the function
    while it pauses: gradients, inference mode, autocast, modes. It starts with those of the caller's thread that
    `Ambient` has, its contextvars, its stream of the accelerator and what it counts; not with its modes.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run, self._ambient, self._counts = run, Ambient.capture(), open_counts()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        self.done = False
        start = contextvars.copy_context().run
        self._thread = threading.Thread(target=start, args=(self._main,), name="pipeline-row", daemon=True)

    def advance(self) -> None:
        """Let it run until it pauses or ends; raises what it raised."""
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Called inside `run`: go on when advanced again."""
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """Unwind it from where it stands."""
        self._abandoned = True
        if self._thread.is_alive() and not self.done:
            self._go.release()
            self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        try:
            with self._surroundings():
                self._run()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._back.release()

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        with self._ambient.restored(), counting(self._counts):
            if self._stream is not None:
                torch.cuda.set_stream(self._stream)
            yield
