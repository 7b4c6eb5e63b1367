"""The order of everything that wraps the denoiser call, written once.

Features are applied innermost first. Those that this version has:

    guidance   9  deals rows to the cfg axis, joins rows of requests
    trap      10  outermost: a task stops here

The numbers are the places of the full order in docs/architecture.md; a feature that lands takes its line here.
"""

from __future__ import annotations

from typing import Any

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features.guidance import Guidance
from denoised.spec.model_spec import ModelSpec
from denoised.steps.rows import RowRules
from denoised.steps.trap import install, targets_of

MAX_JOINED_ROWS = 16


def build(pipeline: Any, spec: ModelSpec, config: EngineConfig, *, rank: int, num_ranks: int) -> Guidance:
    """Wrap a pristine pipeline's components in place; gives what runs its denoiser calls.

    Raises:
        InvalidConfigError: ranks are asked for and the pipeline has no denoiser whose rows could be dealt.
    """
    if num_ranks > 1 and not spec.denoisers:
        raise InvalidConfigError(
            f"cfg_parallel_size={num_ranks}: {spec.pipeline} has no component named transformer or unet "
            "whose calls could be dealt; use cfg_parallel_size=1."
        )
    rules = row_rules(spec)
    guidance = Guidance(
        rules=lambda call: rules,
        num_ranks=num_ranks,
        rank=rank,
        join=not config.deterministic,
        max_rows=MAX_JOINED_ROWS,
    )
    trap(pipeline, spec)
    return guidance


def row_rules(spec: ModelSpec) -> RowRules:
    """What the spec says about rows, in the words of `steps`."""
    return RowRules(
        shared=spec.shared, lists=spec.row_lists, padded=spec.padded, whole=spec.whole_calls, trusted=spec.declared
    )


def trap(pipeline: Any, spec: ModelSpec) -> None:
    """Make tasks stop at every component call of this pipeline."""
    components = hf.components(pipeline)
    for target in list(targets_of(components, spec.denoisers)):
        install(components[target.name], target)
