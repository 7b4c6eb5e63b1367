"""What caches need to know of a model, found out by watching it: runs without skipping, and a fit to what they showed.

TeaCache gets the polynomial that foretells how much what the blocks add changes, from how much their input does;
MagCache gets how the size of what they add goes from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from denoised.errors import InvalidConfigError, InvalidRequestError
from denoised.outputs import OmniRequestOutput
from denoised.request import OmniDiffusionSamplingParams, PromptDict

# What TeaCache can watch of a model.
PROBES = ("input", "timestep")
# Enough that one parameter does not fit one point.
MIN_POINTS_A_COEFFICIENT = 3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings by backend, and how well they hold.

    probe: what was watched. num_points: steps of all rows. r2: the share of the changes' variance that the polynomial
    explains. ratio_spread: the largest standard deviation of a step's ratio over rows, relative to it.
    """

    settings: dict[str, dict[str, Any]]
    probe: str
    num_runs: int
    num_steps: int
    num_points: int
    r2: float
    ratio_spread: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def best(
    prompts: Sequence[PromptDict],
    params: OmniDiffusionSamplingParams,
    *,
    degree: int,
    probes: Sequence[str],
    settings: dict[str, Any],
    say: Callable[[str, str], None],
) -> Fit:
    """The fit that explains most, of the probes that the model has. say: is told which it refuses, and why.

    Raises:
        InvalidConfigError: it refuses all of them.
        InvalidRequestError: as `calibrate`.
    """
    fits: list[Fit] = []
    refused: list[tuple[str, InvalidConfigError]] = []
    for probe in probes:
        try:
            fits.append(calibrate(prompts, params, degree=degree, probe=probe, settings=settings))
        except InvalidConfigError as error:
            refused.append((probe, error))
    if not fits:
        raise refused[0][1]
    for probe, error in refused:
        say(probe, str(error))
    return max(fits, key=lambda fit: fit.r2)


def calibrate(
    prompts: Sequence[PromptDict],
    params: OmniDiffusionSamplingParams,
    *,
    degree: int,
    probe: str,
    settings: dict[str, Any],
) -> Fit:
    """Run all prompts on an engine with these settings, each with a seed of its own, and fit.

    Raises:
        InvalidRequestError: a run failed, or there are too few steps for such a polynomial.
    """
    watched = settings | {"cache_backend": "calibration", "cache_config": {"probe": probe}}
    (outputs,) = runs(prompts, [params], watched)
    return fit([_trajectories(output) for output in outputs], degree=degree, probe=probe)


def runs(
    prompts: Sequence[PromptDict], params: Sequence[OmniDiffusionSamplingParams], settings: dict[str, Any]
) -> list[list[OmniRequestOutput]]:
    """The prompts on one engine, each with a seed of its own; once for each of `params`."""
    from denoised.runtime.omni import Omni

    found = []
    with Omni(**settings) as omni:
        for one in params:
            first = one.seed or 0
            each = [replace(one, seed=seed) for seed in range(first, first + len(prompts))]
            found.append(omni.generate(list(prompts), each))
    return found


def _trajectories(output: OmniRequestOutput) -> list[list[list[float]]]:
    """Of each row of a request, step by step: change of the input, change of what was added, its size's ratio."""
    if output.error is not None:
        raise InvalidRequestError(output.error)
    assert output.receipt is not None
    assert output.receipt.cache is not None, "a calibration has a record"
    return [row["measured"] for row in output.receipt.cache["rows"] if "measured" in row]


def fit(runs: Sequence[list[list[list[float]]]], *, degree: int, probe: str) -> Fit:
    """The settings that fit these trajectories.

    Raises:
        InvalidRequestError: there are too few steps for such a polynomial.
    """
    rows = [row for run in runs for row in run]
    points = np.array([step for row in rows for step in row if step])
    if len(points) < MIN_POINTS_A_COEFFICIENT * (degree + 1):
        raise InvalidRequestError(
            f"num_inference_steps: {len(points)} steps are too few for a polynomial of degree {degree}; use more "
            "steps or prompts, or a lower degree."
        )
    coefficients = np.polyfit(points[:, 0], points[:, 1], degree)
    ratios, spread = _ratios(rows)
    tea_cache = {"coefficients": [float(f"{value:.8g}") for value in coefficients], "probe": probe}
    return Fit(
        settings={"tea_cache": tea_cache, "mag_cache": {"mag_ratios": ratios}},
        probe=probe,
        num_runs=len(runs),
        num_steps=len(ratios),
        num_points=len(points),
        r2=explained(points[:, 1], np.polyval(coefficients, points[:, 0])),
        ratio_spread=spread,
    )


def explained(found: Any, foretold: Any) -> float:
    """R²: 1 less the share of the variance that is left."""
    spread = float(((found - found.mean()) ** 2).sum())
    return 1 - float(((found - foretold) ** 2).sum()) / spread if spread else 1.0


def _ratios(rows: list[list[list[float]]]) -> tuple[list[float], float]:
    """Each step's mean ratio over the rows of full length, and the largest relative deviation of one."""
    longest = max(len(row) for row in rows)
    full = [row for row in rows if len(row) == longest]
    table = np.array([[step[2] if step else 1.0 for step in row] for row in full])
    mean = table.mean(axis=0)
    return [round(float(value), 5) for value in mean], float((table.std(axis=0) / mean).max())
