"""What `test_faults.py` runs: pipelines of a line, and a body for a rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers import DiffusionPipeline

from denoised import Omni
from tests.contract.support import as_omni, difference, seed_of
from tests.sweep import checks


class Inner(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, prompt: str) -> None: ...


class Outer(DiffusionPipeline):  # type: ignore[misc]
    """Keeps a pipeline as an attribute and registers its scheduler, as combined pipelines do."""

    def __init__(self, scheduler: Any = None) -> None:
        super().__init__()

    def take(self, inner: Inner) -> None:
        self.register_modules(scheduler=inner.scheduler)
        self.inner = inner

    def __call__(self, prompt: str) -> None: ...


def after_a_cancelled_one(rank: int, world_size: int) -> dict[str, Any]:
    """A request without perturbed attention, after one with it that was cancelled at its first step."""
    case = checks.case_of("StableDiffusionPAGPipeline")
    without = dataclasses.replace(case, call={**case.call, "pag_scale": 0.0})
    with checks.quiet():
        pipeline = checks.built(case)
        expected = checks.plain(pipeline, without, 0)
        with Omni(pipeline, deterministic=True, num_threads=1) as omni:
            (stopped,) = checks.stopped_at_first_step(omni, case)
            prompt, params = as_omni(without.request(0), seed_of(0), case.output_type)
            (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert output.error is None, output.error
    found = difference(expected, checks.flat(output.images))
    return {"difference": found, "exclusive": omni.info.exclusive, "error": stopped.error}
