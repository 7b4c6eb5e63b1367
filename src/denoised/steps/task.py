"""A request as a program that can be stopped: an unmodified pipeline call on a thread of its own.

The task's thread and the engine's never run at the same time; one hands over to the other. A trapped component call
adds a `Call` to `pending`. Encoder and VAE calls stop the task at once; a denoiser call returns a `Deferred`, and the
task runs on until it needs a value.

A task does not know what a pipeline is, which rank computes what, or what other tasks there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from denoised.steps.current import set_current_task
from denoised.steps.deferred import Deferred, Source, plain
from denoised.steps.forward import Ambient, Call, Stage, Target


class Cancelled(BaseException):
    """Unwinds a cancelled program. Not an Exception, so that pipelines do not catch it."""


class Task:
    """`program()` with suspension. `arities` remembers, per denoiser, how many outputs a call has."""

    def __init__(
        self,
        task_id: str,
        program: Callable[[], Any],
        *,
        seed: int,
        arities: dict[str, int] | None = None,
        defer: bool = True,
    ) -> None:
        self.task_id = task_id
        self.pending: list[Call] = []
        self.value: Any = None
        self.error: Exception | None = None
        self.done = self.cancelled = False
        self.notes: list[str] = []
        self._program: Callable[[], Any] | None = program
        self._defer = defer
        self._arities = arities if arities is not None else {}
        self._branch = 0
        self._state: dict[tuple[str, int], dict[str, Any]] = {}
        self._random_state = torch.Generator().manual_seed(seed).get_state()
        self._to_task, self._to_engine = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name=f"task-{task_id}", daemon=True)

    # Called on the engine's thread.

    def advance(self) -> None:
        """Run the program until it needs the value of a pending call, or ends."""
        assert not self.done, "a finished task cannot advance"
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        if not self._thread.is_alive():
            self._thread.start()
        self._to_task.release()
        self._to_engine.acquire()
        self._random_state = torch.get_rng_state()
        torch.set_rng_state(outside)

    def run_atomic(self, call: Call) -> Any:
        """Run an encoder or VAE call under this task's own global random state."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        try:
            return call.run()
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(outside)

    def cancel(self) -> None:
        """Unwind the program from where it stands and drop what it holds."""
        if self.done:
            return
        self.cancelled = True
        if self._thread.is_alive():
            self.advance()
        self._end()

    # Called on the task's thread.

    def trap(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Suspend a component call; gives a Deferred for a denoiser, the value for anything else."""
        is_denoiser = target.stage is Stage.DENOISE
        call = Call(
            task_id=self.task_id,
            target=target,
            args=plain(args),
            kwargs=plain(kwargs),
            branch=self._branch if is_denoiser else 0,
            ambient=Ambient.capture(),
            source=Source(self._wait, self._arities.get(target.name)),
        )
        call.state = self._state.setdefault((target.name, call.branch), {})
        self.pending.append(call)
        if not is_denoiser:
            return call.source.get()
        self._branch += 1
        deferred = Deferred.of(call.source)
        return deferred if self._defer else deferred.force()

    def note(self, text: str) -> None:
        """Keep what the pipeline warned of, once."""
        if text not in self.notes:
            self.notes.append(text)

    def new_step(self) -> None:
        """The scheduler stepped: the next denoiser call is branch 0 again."""
        self._branch = 0

    def learn(self, call: Call, value: Any) -> None:
        """Remember how many outputs a denoiser call has, so that unpacking the next one does not force it."""
        if isinstance(value, list | tuple):
            self._arities.setdefault(call.target.name, len(value))

    def _wait(self) -> None:
        self._to_engine.release()
        self._to_task.acquire()
        if self.cancelled:
            raise Cancelled

    def _main(self) -> None:
        self._to_task.acquire()
        set_current_task(self)
        try:
            if not self.cancelled:
                assert self._program is not None
                self.value = self._program()
        except Cancelled:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._end()
            set_current_task(None)
            self._to_engine.release()

    def _end(self) -> None:
        self.done = True
        self._program = None
        self.pending.clear()
        self._state.clear()
