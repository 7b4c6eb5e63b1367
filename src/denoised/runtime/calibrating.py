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
from denoised.runtime import conditions
from denoised.runtime.conditions import Conditions

# What TeaCache can watch of a model.
PROBES = ("input", "timestep")
# Enough that one parameter does not fit one point.
MIN_POINTS_A_COEFFICIENT = 3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings by backend, and how well they hold.

    probe: what was watched. num_points: steps of all rows. r2: the share of the changes' variance that the polynomial
    explains. ratio_spread: the largest standard deviation of a step's ratio over rows, relative to it. conditions:
    under which the runs were made.
    """

    settings: dict[str, dict[str, Any]]
    probe: str
    num_runs: int
    num_steps: int
    num_points: int
    r2: float
    ratio_spread: float
    conditions: Conditions | None = None

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
    for probe, problem in refused:
        say(probe, str(problem))
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
    found = fit([_courses(output) for output in outputs], degree=degree, probe=probe)
    return replace(found, conditions=conditions.of(outputs))


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


@dataclass(frozen=True, kw_only=True)
class Course:
    """What was seen of one row in one component.

    numbers: of its steps, in the whole run. seen: of each step the change of the input, the change of what was added,
    and its size's ratio; empty where there is no step before to compare with.
    """

    component: str
    numbers: list[int]
    seen: list[list[float]]

    @property
    def places(self) -> list[int]:
        """Its steps' places in the run. A program that does not tell numbers has the same for all of them."""
        told = len(set(self.numbers)) == len(self.numbers)
        return self.numbers if told else list(range(len(self.numbers)))

    @property
    def points(self) -> list[list[float]]:
        return [step for step in self.seen if step]


def _courses(output: OmniRequestOutput) -> list[Course]:
    if output.error is not None:
        raise InvalidRequestError(output.error)
    assert output.receipt is not None
    assert output.receipt.cache is not None, "a calibration has a record"
    rows = [row for row in output.receipt.cache["rows"] if "measured" in row]
    return [Course(component=row["component"], numbers=row["numbers"], seen=row["measured"]) for row in rows]


def fit(runs: Sequence[list[Course]], *, degree: int, probe: str) -> Fit:
    """The settings that fit these runs: a polynomial for each component, for each is a model of its own; ratios by
    the step of the whole run, of whichever component makes it.

    Raises:
        InvalidRequestError: there are too few steps for such a polynomial.
    """
    courses = [course for run in runs for course in run]
    points = {
        name: np.array([point for course in courses if course.component == name for point in course.points])
        for name in dict.fromkeys(course.component for course in courses)
    }
    coefficients = {name: _polynomial(found, degree, name) for name, found in points.items()}
    foretold = [np.polyval(coefficients[name], found[:, 0]) for name, found in points.items()]
    written: dict[str, Any] = {
        name: [float(f"{value:.8g}") for value in found] for name, found in coefficients.items()
    }
    ratios, spread = _ratios(courses)
    by_component = written if len(written) > 1 else next(iter(written.values()))
    every = np.concatenate(list(points.values()))
    return Fit(
        settings={
            "tea_cache": {"coefficients": by_component, "probe": probe},
            "mag_cache": {"mag_ratios": ratios},
        },
        probe=probe,
        num_runs=len(runs),
        num_steps=len(ratios),
        num_points=len(every),
        r2=explained(every[:, 1], np.concatenate(foretold)),
        ratio_spread=spread,
    )


def _polynomial(points: Any, degree: int, component: str) -> Any:
    if len(points) < MIN_POINTS_A_COEFFICIENT * (degree + 1):
        raise InvalidRequestError(
            f"num_inference_steps: {len(points)} steps of {component} are too few for polynomials of degree {degree}; "
            "use more steps or prompts, or a lower degree."
        )
    return np.polyfit(points[:, 0], points[:, 1], degree)


def explained(found: Any, foretold: Any) -> float:
    """R²: 1 less the share of the variance that is left."""
    spread = float(((found - found.mean()) ** 2).sum())
    return 1 - float(((found - foretold) ** 2).sum()) / spread if spread else 1.0


def _ratios(courses: Sequence[Course]) -> tuple[list[float], float]:
    """Each step's mean ratio over the rows that have one, and the largest relative deviation of one. 1 where none has:
    nothing is skipped in a component's first step."""
    found: dict[int, list[float]] = {}
    for course in courses:
        for place, step in zip(course.places, course.seen, strict=True):
            found.setdefault(place, []).extend(step[2:])
    steps = [np.array(found.get(place) or [1.0]) for place in range(max(found) + 1)]
    return [round(float(one.mean()), 5) for one in steps], max(float(one.std() / one.mean()) for one in steps)
