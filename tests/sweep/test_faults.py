"""Faults of the engine that the sweep over all pipelines found, each as small as it can be shown."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from denoised.steps import rows
from denoised.steps.ambient import Ambient
from denoised.steps.deferred import Source
from denoised.steps.forward import Call, Stage, Target
from denoised.steps.rows import Piece, RowRules
from denoised.steps.trap import StepCount, progress_bar, request_copy, stepped
from tests.ranks import run_on_ranks
from tests.sweep import faults


def test_a_scheduler_of_a_request_is_of_its_class() -> None:
    """Bria asks `type(scheduler) != FlowMatchEulerDiscreteScheduler`."""
    own = stepped(FlowMatchEulerDiscreteScheduler)
    assert own == FlowMatchEulerDiscreteScheduler
    assert FlowMatchEulerDiscreteScheduler == own
    assert own != HeunDiscreteScheduler
    assert own in {FlowMatchEulerDiscreteScheduler}
    assert stepped(own) is own
    assert inspect.signature(own.step) == inspect.signature(FlowMatchEulerDiscreteScheduler.step)


def test_steps_are_reported_without_a_progress_bar() -> None:
    """AnyFlow-FAR draws bars of its own; a pipeline with a bar is not counted twice."""
    seen: list[tuple[int, int]] = []
    steps = StepCount(lambda step, total: seen.append((step, total)))
    copy.deepcopy({"a scheduler's": steps})["a scheduler's"](2)
    steps(2)
    assert seen == [(1, 2), (2, 2)]
    list(progress_bar(lambda step, total: seen.append((step, -total)), steps)(range(2)))
    steps(2)
    assert seen[2:] == [(1, -2), (2, -2)]


def _call(text: torch.Tensor) -> Call:
    """Latents [rows, 3] and text of two frames a row [2 rows, 4]; the frames of a row are summed."""

    def forward(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return latents + text.reshape(len(latents), 2, 4).sum((1, 2))[:, None]

    target = Target(name="unet", method="forward", stage=Stage.DENOISE, function=forward)
    latents = torch.arange(len(text) // 2 * 3.0).reshape(-1, 3)
    source = Source(lambda: None)
    return Call(
        task_id=str(id(text)),
        target=target,
        args=(),
        kwargs={"latents": latents, "text": text},
        branch=0,
        ambient=Ambient.capture(),
        source=source,
    )


def test_text_of_every_frame_is_cut_and_joined_with_its_row() -> None:
    rules = RowRules(folded=frozenset({"text"}))
    calls = [_call(torch.randn(4, 4)), _call(torch.randn(4, 4))]
    whole = [call.run() for call in calls]
    pieces = [Piece(call=call, rows=(1,), batch=2) for call in calls]
    (alone,) = rows.run(pieces[:1], rules)
    assert torch.equal(alone, whole[0][1:])
    joined = rows.run(pieces, rules)
    assert all(torch.equal(part, full[1:]) for part, full in zip(joined, whole, strict=True))
    assert rows.signature(calls[0], rules) == rows.signature(calls[1], rules)
    assert not torch.equal(rows.run(pieces[:1], rules)[0], whole[0][:1])


def test_pipelines_in_a_pipeline_are_a_requests_own() -> None:
    """Kandinsky and Stable Cascade are a prior and a decoder; both step schedulers, which no request may share."""
    inner, outer = faults.Inner(FlowMatchEulerDiscreteScheduler()), faults.Outer()
    outer.take(inner)
    own = request_copy(outer, report=lambda step, total: None, observer=None)
    assert own.inner is not inner
    assert own.inner.scheduler is own.scheduler
    assert own.scheduler is not inner.scheduler
    assert isinstance(own.inner.progress_bar(range(1)), object)
    assert outer.inner is inner


@pytest.mark.timeout(300)
def test_what_a_cancelled_request_changed_is_put_back() -> None:
    """Perturbed attention replaces the processors of the UNet that all requests share, and a cancelled call does not
    tidy up: the next request, without it, would find them."""
    (found,) = run_on_ranks(faults.after_a_cancelled_one, 1, timeout=120)
    assert found == {"difference": 0.0, "exclusive": True, "error": "aborted"}
