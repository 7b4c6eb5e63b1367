"""Where tasks stop: traps on the methods of a pipeline's components, and the per-request copy of a pipeline.

Modules stay in place; only the method is replaced, once, by a stand-in with the same signature that asks which task is
running on this thread. Outside a task it calls what was there before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from denoised import hf
from denoised.steps.current import current_task
from denoised.steps.deferred import plain
from denoised.steps.forward import Stage, Target
from denoised.steps.task import Task

DENOISERS = ("transformer", "transformer_2", "unet", "prior")
# Modules that run after the last step; every other module that is no denoiser and no VAE prepares conditions.
DECODERS = ("vocoder", "safety_checker", "decoder")


def targets_of(components: dict[str, Any], denoisers: tuple[str, ...], **of_denoisers: Any) -> Iterator[Target]:
    """The methods of a pipeline's components at which a task stops; `of_denoisers`: what else their targets say."""
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        for method, stage in _methods(name, component, denoisers):
            more = of_denoisers if stage is Stage.DENOISE else {}
            yield Target(name=name, method=method, stage=stage, function=getattr(component, method), **more)


def _methods(name: str, component: nn.Module, denoisers: tuple[str, ...]) -> list[tuple[str, Stage]]:
    if name in denoisers:
        return [("forward", Stage.DENOISE)]
    if hasattr(component, "decode") and hasattr(component, "encode"):
        return [("encode", Stage.ENCODE), ("decode", Stage.DECODE)]
    stage = Stage.DECODE if name in DECODERS else Stage.ENCODE
    methods = [("forward", stage)]
    return [*methods, ("generate", stage)] if hasattr(component, "generate") else methods


def install(component: nn.Module, target: Target) -> None:
    """Replace one method by its trap. `inspect.signature` still sees the method's own signature."""

    @functools.wraps(target.function)
    def trapped(*args: Any, **kwargs: Any) -> Any:
        task = current_task()
        return target.function(*args, **kwargs) if task is None else task.trap(target, args, kwargs)

    object.__setattr__(component, target.method, trapped)


class _Alike(type):
    """A class that compares equal to the one it is made from: pipelines ask `type(scheduler) == SomeScheduler`."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


@functools.cache
def stepped(scheduler_class: type) -> type:
    """`scheduler_class` whose `step` waits for its arguments and tells the task. A subclass, so that deep copies
    (which some pipelines make, one scheduler a modality) behave alike."""

    @functools.wraps(scheduler_class.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, task = plain(args), plain(kwargs), current_task()
        run = functools.partial(scheduler_class.step, self)  # type: ignore[attr-defined]
        journal = task.journal if isinstance(task, Task) else None
        result = run(*args, **kwargs) if journal is None else journal.step(self, run, args, kwargs)
        if isinstance(task, Task):
            task.new_step()
            if (steps := self.__dict__.get("_count_steps")) is not None:
                steps(len(self.timesteps))
            if (observe := self.__dict__.get("_observe_step")) is not None:
                observe(args, kwargs, result)
        return result

    body = {"step": step, "__module__": scheduler_class.__module__, "__qualname__": scheduler_class.__qualname__}
    return _Alike(scheduler_class.__name__, (scheduler_class,), body)


class StepObserver:
    """Keeps each step's latents if asked to. One per request, shared by copies of its scheduler."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []
        self.timesteps: list[float] = []

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else 0)
        self.latents.append(latents.detach().clone())
        self.timesteps.append(float(plain(timestep)))

    def __deepcopy__(self, memo: dict[int, Any]) -> StepObserver:
        return self


class ProgressBar:
    """Stands in for the pipeline's progress bar and reports `(step, total)`."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self.total, self.n = report, total, 0

    def update(self, n: int = 1) -> None:
        self.n += int(n)
        self._report(self.n, self.total)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None  # set_postfix, refresh, close: drawing is the client's business


class StepCount:
    """Reports `(step, total)` for programs without a progress bar, as their schedulers step. Shared by copies."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report, self._step = report, 0
        self.needed = True

    def __call__(self, total: int) -> None:
        if self.needed:
            self._step += 1
            self._report(self._step, max(total, self._step))

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCount:
        return self


def progress_bar(report: Callable[[int, int], None], steps: StepCount) -> Callable[..., Any]:
    """A replacement for `DiffusionPipeline.progress_bar`, in both of its forms."""

    def counted(bar: ProgressBar, iterable: Any) -> Iterator[Any]:
        for item in iterable:
            yield item
            bar.update()

    def make(iterable: Any = None, total: int | None = None) -> Any:
        steps.needed = False
        bar = ProgressBar(report, total if total is not None else len(iterable))
        return contextlib.nullcontext(bar) if iterable is None else counted(bar, iterable)

    return make


def request_copy(pipeline: Any, *, report: Callable[[int, int], None], observer: StepObserver | None) -> Any:
    """A copy of `pipeline` for one request: modules shared, schedulers and other stateful components its own.

    Pipelines that it is made of are copied too, with the same duplicates: what is one object there stays one.
    """
    steps = StepCount(report)
    duplicates: dict[int, Any] = {}

    def duplicate(component: Any) -> Any:
        if id(component) not in duplicates:
            duplicates[id(component)] = _own_component(component, steps, observer)
        return duplicates[id(component)]

    def copied(original: Any) -> Any:
        own = copy.copy(original)
        # Not setattr: that would rewrite the pipeline's own configuration.
        own.__dict__.update({n: duplicate(c) for n, c in hf.stateful_components(original).items()})
        own.__dict__.update({n: copied(inner) for n, inner in hf.inner_pipelines(original).items()})
        own.__dict__["progress_bar"] = progress_bar(report, steps)
        return own

    return copied(pipeline)


def _own_component(component: Any, steps: StepCount, observer: StepObserver | None) -> Any:
    duplicate = copy.deepcopy(component)
    if hasattr(duplicate, "step") and hasattr(duplicate, "set_timesteps"):
        duplicate.__class__ = stepped(duplicate.__class__)
        duplicate.__dict__ |= {"_observe_step": observer, "_count_steps": steps}
    return duplicate
