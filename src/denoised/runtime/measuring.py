"""What settings of caches do to the pictures of a model: how many steps they skip, and how alike the pictures stay.

Each cache brings its settings from careful to bold (`LADDER` in its policy's file). They are tried in that order,
until the worst picture is worse than anybody would ask for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from denoised.features.cache import policy_of
from denoised.features.cache.policies import kinds
from denoised.outputs import OmniRequestOutput
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.runtime.budget import Measured
from denoised.runtime.calibrating import runs
from denoised.runtime.likeness import mean, pictures, ssim

# A ladder is left when its worst picture is below this SSIM at every number of steps.
FLOOR = 0.85


def measure(
    prompts: Sequence[PromptDict],
    params: OmniDiffusionSamplingParams,
    *,
    num_steps: Sequence[int],
    known: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    say: Callable[[Measured], None] = lambda one: None,
) -> list[Measured]:
    """Try the ladders of all caches on engines with these `settings`, with each number of steps.

    known: what is the model's own of a cache's settings, as a `Fit` has it. say: is told what was measured as it is.

    Raises:
        InvalidRequestError: a run failed, or the model makes no pictures.
    """
    trial = Trial.of(prompts, [replace(params, num_inference_steps=n) for n in num_steps], settings)
    measured: list[Measured] = []
    for backend, kind in sorted(kinds().items()):
        for config in getattr(kind, "LADDER", ()):
            found = list(trial.measure(backend, known.get(backend, {}), config))
            measured += found
            for one in found:
                say(one)
            if max(one.worst for one in found) < FLOOR:
                break
    return measured


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Requests, and their pictures without a cache: `plain` by the entries of `params`, then by prompt."""

    prompts: Sequence[PromptDict]
    params: Sequence[OmniDiffusionSamplingParams]
    settings: dict[str, Any]
    plain: list[list[Tensor]]

    @staticmethod
    def of(
        prompts: Sequence[PromptDict], params: Sequence[OmniDiffusionSamplingParams], settings: dict[str, Any]
    ) -> Trial:
        plain = [[pictures(output) for output in outputs] for outputs in runs(prompts, params, settings)]
        return Trial(prompts=prompts, params=params, settings=settings, plain=plain)

    def measure(self, backend: str, known: dict[str, Any], config: dict[str, Any]) -> Iterator[Measured]:
        """One setting, at each of the numbers of steps."""
        cache = {"cache_backend": backend, "cache_config": known | config}
        found = runs(self.prompts, self.params, self.settings | cache)
        for params, outputs, plain in zip(self.params, found, self.plain, strict=True):
            alike = [min(ssim(pictures(ours), theirs)) for ours, theirs in zip(outputs, plain, strict=True)]
            assert params.num_inference_steps is not None
            yield Measured(
                backend=backend,
                config=config,
                num_steps=params.num_inference_steps,
                num_pictures=len(outputs),
                skipped=round(mean([skipped(output) for output in outputs]), 4),
                work=round(mean([work(output, backend, known | config) for output in outputs]), 4),
                ssim=round(mean(alike), 5),
                worst=round(min(alike), 5),
            )


def skipped(output: OmniRequestOutput) -> float:
    """The share of a request's row steps that its cache skipped; 0 without one."""
    cache = output.receipt.cache if output.receipt is not None else None
    return cache["skipped"] / max(1, cache["skipped"] + cache["computed"]) if cache is not None else 0.0


def work(output: OmniRequestOutput, backend: str, config: dict[str, Any]) -> float:
    """The share of its blocks' runs that were left: a skipped step still runs the blocks at either end."""
    assert output.receipt is not None
    counts = sum((Counter(rank.counts) for rank in output.receipt.ranks), Counter[str]())
    if not counts["cache_forwards_skipped"]:
        return 1.0
    one = {key: next(iter(v.values())) if isinstance(v, dict) else v for key, v in config.items()}  # of any component
    look = policy_of(backend, one).look
    left_out = counts["cache_blocks_skipped"] / counts["cache_forwards_skipped"]
    return 1 - skipped(output) * left_out / (left_out + look.first + look.last)
