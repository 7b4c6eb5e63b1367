"""`denoised plan`: what a model needs on a number of GPUs and how fast it would be, from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from denoised.cli.flags import ENGINE, PARALLEL, flags, given, with_flags
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.choose import Option, Plan
from denoised.runtime.planning.hardware import GIB, HARDWARE, LINK_EFFICIENCY, Hardware
from denoised.runtime.planning.layout import Layout, of_config

ASK = flags(Ask, "Request")
# Settings of the engine that a plan depends on.
SETTINGS = {name: ENGINE[name] for name in ("dtype", "quantization", "attention_backend")}
GPUS = ", ".join(HARDWARE)
SHOWN = 12


@with_flags(ASK, PARALLEL, SETTINGS)
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder in diffusers layout, or built-in name.")],
    *,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, max=64, help="Devices (default: 1).")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help=f"What they are: {GPUS} (default: h100).")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine for half a minute, and plan for it.")
    ] = False,
    efficiency: Annotated[
        float | None, typer.Option("--efficiency", help="Share of the peak that blocks reach, from your runs.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", help="GB/s that arrive between two devices, one way.")
    ] = None,
    all_layouts: Annotated[bool, typer.Option("--all", help=f"All layouts, not the best {SHOWN}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    **values: Any,
) -> None:
    """Say what a model needs and how fast it would be, before anything is loaded.

    With flags of "Ranks": that layout alone. Without: all layouts of --gpus devices, best first.
    """
    from denoised.cli.console import loading
    from denoised.runtime.plan import plan as plan_all
    from denoised.runtime.plan import plan_one, read

    hardware = _adjusted(_hardware(gpu, measure=measure), efficiency, bandwidth)
    layout, num_ranks = _asked_layout(given(PARALLEL, values), gpus)
    ask = Ask(**given(ASK, values))
    config = EngineConfig(**given(SETTINGS, values))
    validate(config)
    dtype = config.dtype or ("float32" if hardware.cores else "bfloat16")
    with loading(model):
        facts = read(model, ask, dtype=dtype, config=config, device="cpu" if hardware.cores else "cuda")
    found = plan_all(facts, hardware, num_ranks) if layout is None else plan_one(facts, hardware, layout)
    if as_json:
        json.dump(_as_dict(found), sys.stdout, indent=2)
        print()
    else:
        _show(found, dtype, None if all_layouts else SHOWN)


def _hardware(gpu: str | None, *, measure: bool) -> Hardware:
    if measure and gpu is not None:
        raise InvalidConfigError(f"gpu={gpu!r} cannot go with --measure, which plans for this machine; leave one out.")
    if measure:
        from denoised.runtime.plan import measure as measured

        return measured()
    name = (gpu or "h100").lower()
    if name not in HARDWARE:
        raise InvalidConfigError(f"gpu={gpu!r}: must be one of {GPUS}.")
    return HARDWARE[name]


def _adjusted(hardware: Hardware, efficiency: float | None, bandwidth: float | None) -> Hardware:
    """With the user's own numbers instead of ours."""
    if efficiency is not None:
        if not 0 < efficiency <= 1:
            raise InvalidConfigError(f"efficiency={efficiency}: must be above 0 and at most 1, a share of the peak.")
        attention = efficiency / hardware.attention_weight(ring=1)
        hardware = dataclasses.replace(hardware, efficiency=efficiency, attention_efficiency=attention)
    if bandwidth is not None:
        if bandwidth <= 0:
            raise InvalidConfigError(f"bandwidth={bandwidth}: must be above 0, in GB/s one way.")
        hardware = dataclasses.replace(hardware, link=bandwidth * 1e9 / LINK_EFFICIENCY)
    return hardware


def _asked_layout(parallel: dict[str, Any], gpus: int | None) -> tuple[Layout | None, int]:
    """The layout that flags name, if they name one, and the number of ranks.

    Raises:
        InvalidConfigError: the number of GPUs is not the product of the degrees.
    """
    if not parallel:
        return None, gpus or 1
    config = DiffusionParallelConfig(**parallel)
    if config.data_parallel_size > 1:
        raise InvalidConfigError(
            f"data_parallel_size={config.data_parallel_size}: replicas share nothing but their requests; plan one of "
            "them, without it."
        )
    if gpus not in (None, config.world_size):
        raise InvalidConfigError(f"gpus={gpus} is not {config.formula()}; leave --gpus out or make them agree.")
    return of_config(config), config.world_size


def _show(found: Plan, dtype: str, shown: int | None) -> None:
    from rich.console import Console

    # A pipe has no width: lines are then as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 300, highlight=False)
    console.print(_title(found, dtype), markup=False)
    console.print(_components(found))
    console.print()
    console.print(_layouts(found, shown))
    hidden = len(found.options) - (shown or len(found.options))
    if hidden > 0:
        console.print(f"and {hidden} more: --all", markup=False)
    console.print()
    console.print(f"Recommended: {found.why}", markup=False)
    console.print(f"Flags: {found.best.prediction.layout.flags()}", markup=False)
    console.print("Predictions are for comparing layouts; docs/plan.md says what they leave out.", markup=False)


def _title(found: Plan, dtype: str) -> str:
    model, tokens = found.model, found.model.tokens
    size = " x ".join(map(str, model.size))
    stored = "".join(f", {name} in {method}" for name, method in model.methods)
    return (
        f"{model.model} ({model.pipeline}), {dtype}{stored}, on {found.best.prediction.layout.num_ranks} x "
        f"{found.hardware.name}\n{size + ': ' if size else ''}{tokens.image} image and {tokens.text} text tokens, "
        f"{model.num_rows} rows in flight, {model.num_steps} steps, {model.flops_per_row / 1e12:.3g} TFLOP a row"
    )


def _components(found: Plan) -> Any:
    from rich.table import Table

    held = found.best.prediction.memory.weights
    table = Table("component", "class", box=None, pad_edge=False)
    for column in ("parameters", "GiB", "GiB a rank"):
        table.add_column(column, justify="right")
    for part in found.model.components:
        whole = found.model.bytes_of(part.name)
        table.add_row(part.name, part.class_name, _count(part.num_params), _gib(whole), _gib(held[part.name]))
    table.add_row("while it computes", "", "", "", _gib(found.best.prediction.memory.working))
    return table


def _layouts(found: Plan, shown: int | None) -> Any:
    from rich.table import Table

    table = Table("", "layout", box=None, pad_edge=False)
    for column in ("step s", "request s", "exchange", "bubble", "GiB sent a step", "GiB a rank"):
        table.add_column(column, justify="right")
    table.add_column("")
    for option in found.options[:shown]:
        table.add_row(*_row(option, recommended=option is found.best))
    return table


def _row(option: Option, *, recommended: bool) -> list[str]:
    found = option.prediction
    remark = "" if option.good else "does not fit" if not found.fits else "idle ranks"
    return [
        "*" if recommended else "",
        found.layout.name(),
        f"{found.step:.3g}",
        f"{found.total:.3g}",
        f"{100 * found.communication / found.step:.0f}%",
        f"{100 * found.bubble:.0f}%",
        f"{found.sent / GIB:.2f}",
        f"{_gib(found.memory.total)} of {_gib(found.room)}",
        remark,
    ]


def _as_dict(found: Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, seconds, operations."""
    facts = dataclasses.asdict(found.model)
    denoisers = facts.pop("denoisers")
    for record, denoiser in zip(denoisers, found.model.denoisers, strict=True):
        record |= {"num_blocks": len(denoiser.blocks), "heads": sorted(denoiser.heads)}
        del record["blocks"], record["rest"], record["limits"]
    facts |= {"denoisers": denoisers, "flops_per_row": found.model.flops_per_row}
    layouts = [_option_dict(option) for option in found.options]
    return {"model": facts, "hardware": dataclasses.asdict(found.hardware), "layouts": layouts, "why": found.why}


def _option_dict(option: Option) -> dict[str, Any]:
    found = option.prediction
    derived = {"flags": found.layout.flags(), "fits": found.fits, "bytes_per_rank": found.memory.total}
    derived |= {"bytes_sent": found.sent, "communication": found.communication}
    return dataclasses.asdict(found) | derived | {"idle": option.idle}


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
