"""A request as a program that can be stopped: an unmodified pipeline call on a thread of its own.

The task's thread and the engine's never run at the same time; one hands over to the other. A trapped component call
adds a `Call` to `pending`. Encoder and VAE calls stop the task at once; a denoiser call returns a `Deferred`, and the
task runs on until it needs a value.

A task does not know what a pipeline is, which rank computes what, or what other tasks there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from denoised.steps import outline
from denoised.steps.ambient import Ambient
from denoised.steps.current import set_current_task
from denoised.steps.deferred import Deferred, Source, Versions, plain, settled
from denoised.steps.forward import Active, Call, Stage, Target
from denoised.steps.journal import Journal
from denoised.steps.unknown import MissingValueError, NeedsValue, known

# torch has one global generator for all threads: engines of one process take turns with it.
_global_generator = threading.Lock()


class Cancelled(BaseException):
    """Unwinds a cancelled program. Not an Exception, so that pipelines do not catch it."""


class Task:
    """`program()` with suspension.

    arities: remembers, per denoiser, the outline of its output.
    journal: records what the program does, and answers it where it is run again; None: neither.
    adapters: that act in its calls, by component.

    `states` is what features keep of its calls, by denoiser and branch.
    """

    def __init__(
        self,
        task_id: str,
        program: Callable[[], Any],
        *,
        seed: int,
        arities: dict[str, Any] | None = None,
        defer: bool = True,
        journal: Journal | None = None,
        adapters: Mapping[str, tuple[Active, ...]] | None = None,
    ) -> None:
        self.task_id = task_id
        self.pending: list[Call] = []
        self.value: Any = None
        self.error: Exception | None = None
        self.done = self.cancelled = False
        self.notes: list[str] = []
        self.step = self.num_steps = 0
        self._program: Callable[[], Any] | None = program
        self._defer, self.journal = defer, journal
        self._adapters = dict(adapters or {})
        self._arities = arities if arities is not None else {}
        self._branch = 0
        self.states: dict[tuple[str, int], dict[str, Any]] = {}
        self._random_state = torch.Generator().manual_seed(seed).get_state()
        self._to_task, self._to_engine = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name=f"task-{task_id}", daemon=True)

    # Called on the engine's thread.

    def advance(self) -> None:
        """Run the program until it needs the value of a pending call, or ends."""
        assert not self.done, "a finished task cannot advance"
        with self._own_random_state():
            if not self._thread.is_alive():
                self._thread.start()
            self._to_task.release()
            self._to_engine.acquire()

    def run_atomic(self, call: Call) -> Any:
        """Run an encoder or VAE call under this task's own global random state."""
        with self._own_random_state():
            return call.run()

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        with _global_generator:
            outside = torch.get_rng_state()
            torch.set_rng_state(self._random_state)
            try:
                yield
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
        if self.cancelled:  # a program that calls a component while it unwinds unwinds from there
            raise Cancelled
        is_denoiser = target.stage is Stage.DENOISE
        args, kwargs = plain(args), plain(kwargs)
        call = Call(
            task_id=self.task_id,
            target=target,
            args=args,
            kwargs=kwargs,
            branch=self._branch if is_denoiser else 0,
            ambient=Ambient.capture(),
            source=Source(self._wait, self._arities.get(_arity_key(target, kwargs))),
            versions=Versions((args, kwargs)) if is_denoiser else None,
            adapters=self._adapters.get(target.name, ()),
            step=self.step,
            num_steps=self.num_steps,
        )
        if is_denoiser:
            call.check_arguments()
        if self.journal is not None:
            if is_denoiser and (answer := self.journal.ask(call)) is not None:
                self._branch += 1
                return answer
            call.args, call.kwargs = self.journal.arguments((call.args, call.kwargs))
        stateful = is_denoiser and call.stateful
        call.state = self.states.setdefault((target.name, call.branch), {})
        self.pending.append(call)
        if not is_denoiser:
            return call.source.get()
        self._branch += 1
        deferred = Deferred.of(call.source)
        # Inference tensors do not tell when they are changed in place, so nothing can be left for later.
        return deferred if self._defer and not stateful and not call.ambient.inference else deferred.force()

    def note(self, text: str) -> None:
        """Keep what the pipeline warned of, once."""
        if text not in self.notes:
            self.notes.append(text)

    def at(self, step: int, num_steps: int) -> None:
        """So many of so many denoising steps are done."""
        self.step, self.num_steps = step, num_steps

    def new_step(self) -> None:
        """The scheduler stepped: the next denoiser call is branch 0 again."""
        self._branch = 0

    def learn(self, call: Call, value: Any) -> None:
        """Remember what a denoiser call gave, so that unpacking the next one does not force it."""
        if self.journal is not None and call.target.stage is Stage.DENOISE:
            self.journal.learn(call, value)
        key, found = _arity_key(call.target, call.kwargs), outline.of_output(value)
        if found is not None:
            self._arities[key] = outline.agreed(self._arities.get(key, found), found)

    def _wait(self) -> None:
        if threading.current_thread() is not self._thread:
            raise RuntimeError("a prediction was looked at outside the pipeline call that asked for it")
        if self.cancelled:
            raise Cancelled
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
                self.value = known(settled(self._program()))
        except Cancelled:
            pass
        except NeedsValue as need:
            self.error = MissingValueError(str(need))
        except BaseException as error:
            unusual = RuntimeError(f"the pipeline raised {type(error).__name__}: {error}")
            self.error = _without_frames(error if isinstance(error, Exception) else unusual)
        finally:
            self._end()
            set_current_task(None)
            self._to_engine.release()

    def _end(self) -> None:
        self.done = True
        self._program = None
        self.pending.clear()
        self.states.clear()


def _arity_key(target: Target, kwargs: dict[str, Any]) -> str:
    """Calls of one key have equally many outputs: flags such as `return_dict` decide."""
    flags = sorted(f"{name}={value}" for name, value in kwargs.items() if isinstance(value, bool | None))
    return " ".join([target.name, *flags])


def _without_frames(error: Exception) -> Exception:
    """`error` without its tracebacks, whose frames hold the latents of a program that is over."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
