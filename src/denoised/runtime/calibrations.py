"""What was found out about a model for caches, kept beside its weights: `calibration.json`, settings by backend and
what they did to pictures; and the settings that keep to a quality by it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError, one_line
from denoised.outputs import Receipt
from denoised.runtime import load
from denoised.runtime.budget import Choice, Measured, best, choose
from denoised.runtime.cache_report import inert
from denoised.runtime.conditions import Conditions, of_receipt

FILE = "calibration.json"


def place(model: Any) -> Path:
    """Where a model's calibration is kept.

    Raises:
        ModelError: it has no folder of its own.
    """
    found = load.locate(str(model))
    if not isinstance(found, Path):
        raise ModelError(f"model={model!r} has no folder to keep a calibration in; download it, or use --output.")
    return found / FILE


def beside(model: Any) -> dict[str, Any]:
    """The settings that lie in a model's folder; empty for a hub id, a pipeline object, or where there are none.

    Raises:
        ModelError: the file is damaged.
    """
    settings: dict[str, Any] = _read(model)[0]
    return settings


def measured(model: Any) -> list[Measured]:
    """What settings did to this model's pictures; empty where nobody measured. Raises as `beside`."""
    return _read(model)[1]


def conditions(model: Any) -> Conditions | None:
    """Under what it was calibrated; None where the file does not say. Raises as `beside`."""
    return _read(model)[2]


def _read(model: Any) -> tuple[dict[str, Any], list[Measured], Conditions | None]:
    place = load.locate(str(model)) if isinstance(model, str | Path) else None
    if not isinstance(place, Path) or not (place / FILE).is_file():
        return {}, [], None
    try:
        found = json.loads((place / FILE).read_text())
        told = found.get("conditions")
        measured = [Measured(**entry) for entry in found.get("measured", ())]
        return dict(found["settings"]), measured, Conditions(**told) if told else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place / FILE} is no calibration ({one_line(error)}); run `denoised calibrate`.") from error


def write(place: Path, found: dict[str, Any], measured: list[Measured]) -> None:
    """`found`: a `Fit` as a dict."""
    text = json.dumps(found, indent=2)
    lines = ",\n".join(f"    {json.dumps(dataclasses.asdict(one))}" for one in measured)
    whole = f"{text[:-2]},\n" + f'  "measured": [\n{lines}\n  ]\n}}\n' if measured else f"{text}\n"
    place.write_text(whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """A quality that was asked for, and the cache that keeps to it; None: nothing is skipped. conditions: under which
    it was measured, if they are known."""

    asked: Any
    least: float
    choice: Choice | None
    conditions: Conditions | None = None

    def onto(self, receipt: Receipt, sizes: Sequence[str] = ()) -> Receipt:
        """The receipt with what was promised beside what was done. sizes: of the pictures."""
        told: dict[str, Any] = {"asked": self.asked, "ssim": self.least, "cache_backend": None}
        told |= {"expected": {"ssim": 1.0, "worst_ssim": 1.0, "skipped": 0.0}, "skipped": _skipped(receipt)}
        if self.choice is None:
            return dataclasses.replace(receipt, quality=told)
        known = self.choice.expected(receipt.steps)
        expected = {"ssim": known.ssim, "worst_ssim": known.worst, "skipped": known.skipped}
        told |= {"cache_backend": self.choice.backend, "cache_config": self.choice.config}
        told |= {"expected": expected | {"num_inference_steps": known.num_steps}}
        doubts = [*self._other_steps(receipt.steps), *self._other_conditions(of_receipt(receipt, sizes=sizes))]
        return dataclasses.replace(receipt, quality=told, notes=[*_reworded(receipt), *doubts])

    def _other_steps(self, steps: int) -> Iterator[str]:
        assert self.choice is not None
        fewest, most = self.choice.num_steps[0], self.choice.num_steps[-1]
        if not fewest <= steps <= most:
            yield (
                f"warning: quality={self.asked!r} was measured at {fewest} to {most} steps, and this request has "
                f"{steps}; run `denoised calibrate --num-inference-steps` with as many to know."
            )

    def _other_conditions(self, now: Conditions) -> Iterator[str]:
        for then, here in self.conditions.unlike(now) if self.conditions is not None else ():
            yield (
                f"warning: quality={self.asked!r} was measured {then}, and this request {here}; run `denoised "
                "calibrate` with the same to know."
            )


def _reworded(receipt: Receipt) -> list[str]:
    """Its notes, of which that of an idle cache names settings that cannot go with a quality."""
    old, new = inert(receipt.cache), inert(receipt.cache, by_quality=True)
    return [*(note for note in receipt.notes if note not in old), *new]


def _skipped(receipt: Receipt) -> float:
    """The share of row steps that were skipped."""
    found = receipt.cache or {"skipped": 0, "computed": 0}
    return round(float(found["skipped"] / max(1, found["skipped"] + found["computed"])), 4)


def within(config: EngineConfig) -> tuple[EngineConfig, Promise | None]:
    """`config` with the cache that keeps to its quality at the least work, in place of the quality.

    Raises:
        InvalidConfigError: nobody measured the model's caches, or none of them keeps to it.
        ModelError: the file is damaged.
    """
    least = config.least_ssim
    if least is None:
        return config, None
    choice = _chosen(config, least) if least < 1 else None
    backend, settings = (choice.backend, choice.config) if choice is not None else (None, None)
    chosen = dataclasses.replace(config, quality=None, cache_backend=backend, cache_config=settings)
    known = conditions(config.model) if choice is not None else None
    return chosen, Promise(asked=config.quality, least=least, choice=choice, conditions=known)


def _chosen(config: EngineConfig, least: float) -> Choice:
    found = measured(config.model)
    choice, known = choose(found, least), best(found)
    if known is None:
        raise InvalidConfigError(
            f"quality={config.quality!r}: what caches do to the pictures of {_name(config)} was never measured; run "
            "`denoised calibrate MODEL --save` on its folder, or set cache_backend."
        )
    if choice is None:
        raise InvalidConfigError(
            f"quality={config.quality!r}: no cache of {_name(config)} keeps its worst picture at an SSIM of {least:g};"
            f' the best that is known is {known.worst:g} ({known.backend}): ask for that, or for "lossless".'
        )
    return choice


def _name(config: EngineConfig) -> str:
    return str(config.model) if isinstance(config.model, str | Path) else f"a {type(config.model).__name__} object"
