"""How drafts are made: several runs that are followed until each has a checkpoint and a picture of what it holds, and
then ended. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import Service
from denoised.server.problems import invalid
from denoised.server.serving import Run

# Without being told: a part of the steps, or so many where their number is not known.
_PART, _FEW = 4, 5
# Previews of a request whose number of steps is not known: one after each.
_ALL = 1000


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A draft ends after `step` steps; with so many evenly spaced previews the first of them comes just then."""

    step: int
    num_previews: int

    def service(self, service: Service) -> Service:
        return replace(service, checkpoint_every=self.step, num_previews=self.num_previews)


def goal(draft_steps: int | None, total: int | None) -> Goal:
    """Where drafts of at most `draft_steps` of `total` steps end.

    Raises:
        Refusal: there is nothing left to go on with.
    """
    if total is None:
        return Goal(step=draft_steps or _FEW, num_previews=_ALL)
    wanted = draft_steps or max(1, total // _PART)
    if wanted >= total:
        raise invalid(f"draft_steps={wanted}: must be fewer than the {total} steps of the picture.", "draft_steps")
    parts = -(-total // wanted)
    return Goal(step=-(-total // parts), num_previews=parts - 1)


def num_steps(*sources: Mapping[str, Any]) -> int | None:
    """The steps that a request asks for, by the first of the sources that says so; None if none does."""
    for source in sources:
        for name in ("sigmas", "timesteps"):
            if source.get(name) is not None:
                return len(source[name])
        if source.get("num_inference_steps") is not None:
            return int(source["num_inference_steps"])
    return None


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What is there of a draft when its run is ended. `images` are what the model had in mind after `pictured_step`:
    that of the checkpoint, or the last, where the steps were done before the preview was decoded."""

    saved: Saved
    images: list[Any]
    pictured_step: int
    total_steps: int


Told = Progress | Preview | Begun


async def begin(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Told]]:
    """Follow runs, of which the first is entered already, until all have their drafts; each with its number.

    Raises:
        Refusal and the engine's errors: of the first that fails; the others are ended.
    """
    told: asyncio.Queue[tuple[int, Told | Exception]] = asyncio.Queue()
    tasks = [asyncio.create_task(_follow(number, run, told)) for number, run in enumerate(runs)]
    missing = len(runs)
    try:
        while missing:
            number, seen = await told.get()
            if isinstance(seen, Exception):
                raise seen
            missing -= isinstance(seen, Begun)
            yield number, seen
    finally:
        if missing:  # else they are ending their runs already
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks)


async def _follow(number: int, run: Run, told: asyncio.Queue[tuple[int, Told | Exception]]) -> None:
    try:
        if number:
            await run.__aenter__()
        try:
            await _until_begun(number, run, told)
        finally:
            await run.end()
    except Exception as error:
        told.put_nowait((number, error))


async def _until_begun(number: int, run: Run, told: asyncio.Queue[tuple[int, Told | Exception]]) -> None:
    saved: Saved | None = None
    shown: Preview | None = None
    total = 0
    async for seen in run.events():
        if isinstance(seen, Progress):
            total = seen.total_steps
        elif isinstance(seen, Saved):
            saved = saved or seen
        elif isinstance(seen, Preview):
            shown = seen
        else:
            told.put_nowait((number, _of_output(seen, saved, total)))
            return
        if isinstance(seen, Progress | Preview):
            told.put_nowait((number, seen))
        if saved is not None and shown is not None:
            step, images = shown.step, shown.images
            told.put_nowait((number, Begun(saved=saved, images=images, pictured_step=step, total_steps=total)))
            return


def _of_output(output: OmniRequestOutput, saved: Saved | None, total: int) -> Begun:
    """A draft whose picture was done before its preview was; the picture itself shows what it is."""
    if saved is None:
        raise _never_begun(output)
    return Begun(saved=saved, images=output.images, pictured_step=total, total_steps=total)


def _never_begun(output: OmniRequestOutput) -> Exception:
    """It came to its end: too few steps, or a program that cannot be put aside, which its receipt then says."""
    receipt = output.receipt
    said = " ".join(receipt.notes) if receipt is not None else ""
    steps = receipt.steps if receipt is not None else 0
    message = f"draft_steps: the picture was done after {steps} steps, before a draft could be kept; "
    return invalid(f"{message}{said or 'ask for fewer.'}", "draft_steps")
