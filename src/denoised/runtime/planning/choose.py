"""Which layout to take: all that a model admits, by predicted time, and one of them with the reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from denoised.errors import InvalidConfigError
from denoised.runtime.planning.facts import ModelFacts
from denoised.runtime.planning.hardware import GIB, Hardware
from denoised.runtime.planning.layout import FIELDS, Layout, admissible, idle, problem
from denoised.runtime.planning.memory import Memory
from denoised.runtime.planning.prediction import Prediction, predict

# Times within this factor count as equal, and the simpler layout wins.
EQUAL = 1.02
# Numbers of ranks that are tried where those asked for do not hold the model.
MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class Option:
    """A layout's prediction. idle: some ranks have no row of these requests; the engine starts it all the same."""

    prediction: Prediction
    idle: bool

    @property
    def good(self) -> bool:
        return self.prediction.fits and not self.idle


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options, best first; the first is the recommended one. `why` is a sentence."""

    model: ModelFacts
    hardware: Hardware
    options: tuple[Option, ...]
    why: str

    @property
    def best(self) -> Option:
        return self.options[0]


def plan(model: ModelFacts, hardware: Hardware, num_ranks: int) -> Plan:
    """All layouts of this many ranks, best first.

    Raises:
        InvalidConfigError: none keeps all ranks busy, none fits, or the device lacks a method of quantization.
    """
    _check_methods(model, hardware)
    options = _options(model, hardware, num_ranks)
    if all(option.idle for option in options):
        raise InvalidConfigError(_no_layout(model, num_ranks))
    if not any(option.good for option in options):
        raise InvalidConfigError(_too_large(options[0].prediction, model, hardware))
    return Plan(model=model, hardware=hardware, options=options, why=_why(options, model, hardware))


def plan_one(model: ModelFacts, hardware: Hardware, layout: Layout) -> Plan:
    """One layout alone.

    Raises:
        InvalidConfigError: the model does not admit it, it does not fit, or the device lacks a method of quantization.
    """
    _check_methods(model, hardware)
    found = problem(layout, model)
    if found is not None:
        raise InvalidConfigError(found)
    option = _option(layout, model, hardware)
    if not option.prediction.fits:
        raise InvalidConfigError(_too_large(option.prediction, model, hardware))
    return Plan(model=model, hardware=hardware, options=(option,), why=_why((option,), model, hardware))


def _check_methods(model: ModelFacts, hardware: Hardware) -> None:
    if not hardware.fp8 and "fp8" in dict(model.methods).values():
        raise InvalidConfigError(
            f"quantization='fp8' does not run on {hardware.name}, which does not multiply float8 by rows; use "
            "'int8' or 'int8_weight_only'."
        )


def _option(layout: Layout, model: ModelFacts, hardware: Hardware) -> Option:
    return Option(prediction=predict(layout, model, hardware), idle=idle(layout, model))


def _options(model: ModelFacts, hardware: Hardware, num_ranks: int) -> tuple[Option, ...]:
    """The best of each set of axes, with and without HSDP and dealt experts: of VAE and text encoder settings one is
    enough."""
    every = sorted((_option(layout, model, hardware) for layout in admissible(model, num_ranks)), key=_order)
    first: dict[tuple[object, ...], Option] = {}
    for option in every:
        layout = option.prediction.layout
        first.setdefault((*(getattr(layout, axis) for axis in FIELDS), layout.hsdp, layout.experts), option)
    return tuple(first.values())


def _order(option: Option) -> tuple[object, ...]:
    """What can be used, by time; among equals the simplest, then the one with most room."""
    found = option.prediction
    time = round(math.log(found.total) / math.log(EQUAL)) if found.total > 0 else 0
    usable = (option.idle, not found.fits)
    return (*usable, time if found.fits else 0, _settings(found.layout) if found.fits else 0, found.memory.total)


def _settings(layout: Layout) -> int:
    """How many settings differ from one rank's."""
    return sum(getattr(layout, f.name) != f.default for f in fields(layout))


def _why(options: tuple[Option, ...], model: ModelFacts, hardware: Hardware) -> str:
    best = options[0].prediction
    waits = "some ranks have nothing to do (ask with a larger --requests)" if options[0].idle else ""
    parts = [
        _speed(best, model, hardware),
        _cost(best),
        waits,
        f"{_gib(best.room - best.memory.total)} GiB a rank stay free",
    ]
    return f"{best.layout.name()}: {', '.join(part for part in parts if part)}."


def _speed(best: Prediction, model: ModelFacts, hardware: Hardware) -> str:
    alone = predict(Layout(), model, hardware)
    if best.layout.num_ranks == 1:
        return "the only layout of one rank"
    unless = "" if alone.fits else " if it could hold the model"
    return f"{alone.total / best.total:.1f} times as fast as one rank{unless}"


def _cost(best: Prediction) -> str:
    exchange = f"{100 * best.communication / best.step:.0f}% of a step is exchange"
    return f"{exchange}, {100 * best.bubble:.0f}% waiting for stages" if best.bubble else exchange


def _no_layout(model: ModelFacts, num_ranks: int) -> str:
    near = [n for n in range(1, num_ranks) if any(not idle(layout, model) for layout in admissible(model, n))]
    return (
        f"gpus={num_ranks}: {model.pipeline} has no layout that keeps {num_ranks} ranks busy with {model.num_rows} "
        f"rows in flight; use {', '.join(map(str, near))} or ask with a larger --requests."
    )


def _too_large(found: Prediction, model: ModelFacts, hardware: Hardware) -> str:
    name, size = _largest(found.memory)
    return (
        f"{model.pipeline} on {found.layout.num_ranks} x {hardware.name}: each rank needs "
        f"{_gib(found.memory.total)} GiB, of which {name} takes {_gib(size)}, and {_gib(found.room)} GiB are there; "
        f"{_way_out(found.layout.num_ranks, model, hardware)}."
    )


def _largest(memory: Memory) -> tuple[str, float]:
    sizes = {**memory.weights, "what lives while it computes": memory.working}
    return max(sizes.items(), key=lambda item: item[1])


def _way_out(num_ranks: int, model: ModelFacts, hardware: Hardware) -> str:
    """The fewest ranks, from those asked for on, that hold it."""
    while num_ranks <= MOST_RANKS:
        fitting = [o for o in _options(model, hardware, num_ranks) if o.good]
        if fitting:
            return f"{num_ranks} hold it with {fitting[0].prediction.layout.flags()}"
        num_ranks *= 2
    smaller = "a smaller size, " if model.kind != "audio" else ""
    return f"up to {MOST_RANKS} do not hold it either, so use {smaller}a smaller dtype or larger devices"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
