"""The clean sample that a prediction points at, from what a scheduler's `step` was given and gave.

Knows what the schedulers of diffusers have in common, by what they have and not by what they are; None where that does
not tell.
"""

from __future__ import annotations

from typing import Any

import torch

FLOW = "flow_prediction"


def clean_sample(scheduler: Any, given: dict[str, Any], leaves: list[torch.Tensor]) -> torch.Tensor:
    """The predicted clean sample of one step, like its sample; the step's own result where nothing tells more.

    Args:
        scheduler: after the step.
        given: arguments of the step by name.
        leaves: tensors of what the step gave.
    """
    prediction, sample = given.get("model_output"), given.get("sample")
    if len(leaves) > 1 and leaves[1].shape == leaves[0].shape:
        return leaves[1]  # by convention the second: most schedulers say it themselves
    if not isinstance(prediction, torch.Tensor) or not isinstance(sample, torch.Tensor):
        return leaves[0]
    for way in (_converted, _along_flow, _by_alphas):
        found = way(scheduler, given, prediction, sample)
        if found is not None and found.shape == leaves[0].shape:
            return found.to(leaves[0].dtype)
    return leaves[0]


def _converted(scheduler: Any, *_: Any) -> torch.Tensor | None:
    """Solvers that work on the clean sample keep it as the last model output."""
    config = scheduler.config
    works_on_clean = config.get("predict_x0") or str(config.get("algorithm_type", "")).endswith("++")
    kept = getattr(scheduler, "model_outputs", None)
    last = kept[-1] if works_on_clean and isinstance(kept, list) and kept else None
    return last if isinstance(last, torch.Tensor) else None


def _along_flow(
    scheduler: Any, given: dict[str, Any], prediction: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor | None:
    """A velocity points from the clean sample to noise: x0 = x - sigma v."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    is_flow = scheduler.config.get("prediction_type", FLOW) == FLOW and not hasattr(scheduler, "alphas_cumprod")
    if not is_flow or sigmas is None or not index or given.get("per_token_timesteps") is not None:
        return None
    sigma = sigmas[index - 1].to(device=sample.device, dtype=torch.float32)
    clean: torch.Tensor = sample.float() - sigma * prediction.float()
    return clean


def _by_alphas(
    scheduler: Any, given: dict[str, Any], prediction: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor | None:
    """Variance-preserving schedules: x_t = sqrt(a) x0 + sqrt(1 - a) noise."""
    alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if alphas is None or kind not in ("epsilon", "v_prediction") or hasattr(scheduler, "sigmas"):
        return None
    alpha = alphas[int(given["timestep"])].to(device=sample.device, dtype=torch.float32)
    noise = (1 - alpha).sqrt()
    clean: torch.Tensor = alpha.sqrt() * sample.float() - noise * prediction.float()
    if kind == "epsilon":
        clean = (sample.float() - noise * prediction.float()) / alpha.sqrt()
    return clean
