"""`denoised bench`: a stated load for a server that runs, or for one that is started for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denoised.cli.flags import flags, given, with_flags
from denoised.cli.load import Found, Mix, load
from denoised.errors import EngineError, InvalidConfigError

if TYPE_CHECKING:
    from rich.table import Table

LOAD = flags(Mix, "Load", without=("bodies",))
_READY = re.compile(r" at (http://\S+), ")


@with_flags(LOAD)
def bench(
    target: Annotated[str, typer.Argument(metavar="URL|MODEL", help="A server's URL, or what to serve meanwhile.")],
    serve_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Of a MODEL: those of denoised serve.")
    ] = None,
    *,
    mix: Annotated[
        Path | None, typer.Option(help='JSON: a list of requests, such as [{"size": "64x64", "weight": 3}, ...].')
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of requests that name none.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps of requests that name none.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="What the server is asked with.", envvar="DENOISED_API_KEY")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here, as JSON.")] = None,
    **values: Any,
) -> None:
    """Load a server and tell throughput, latency, waiting, how true its forecasts are, and errors by kind."""
    common = {k: v for k, v in (("size", size), ("num_inference_steps", num_inference_steps)) if v is not None}
    stated = Mix(bodies=tuple(common | body for body in _bodies(mix)), **given(LOAD, values))
    is_url = target.startswith(("http://", "https://"))
    if is_url and serve_options:
        raise InvalidConfigError(
            f"{serve_options[0]!r:.80} is for a server of our own; give a MODEL instead of a URL."
        )
    with contextlib.nullcontext(target) if is_url else _served(target, serve_options or []) as url:
        found = asyncio.run(load(url, stated, key=api_key))
    _report(found, output)


def _bodies(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return [{}]
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"mix={str(path)!r}: is no JSON file that can be read.") from error
    if not isinstance(found, list) or not found or not all(isinstance(body, dict) for body in found):
        raise InvalidConfigError(f"mix={str(path)!r}: must be a list of requests, each an object.")
    return found


@contextlib.contextmanager
def _served(model: str, options: list[str]) -> Iterator[str]:
    """The URL of a server of `model`, which ends when this is left."""
    command = [sys.executable, "-m", "denoised.cli", "serve", model, "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "DENOISED_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = _READY.search(process.stdout.readline())
        if found is None:
            raise EngineError(f"{model!r:.80} cannot be served; the reason is above.")
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


def _report(found: Found, output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100).print(_table(found))


def _table(found: Found) -> Table:
    from rich.table import Table

    table = Table(title=f"denoised bench: {found.model}", show_header=False, title_justify="left")
    first, half = _share(found.eta_error_first), _share(found.eta_error_half)
    rows = {
        "requests": f"{found.requests} in {found.seconds:.1f} s, {found.completed} completed",
        "throughput": f"{found.throughput:.3g} a second",
        "latency": _times(found.latency_p50, found.latency_p95),
        "until the first step is done": _times(found.first_step_p50, found.first_step_p95),
        "admission wait, mean": _time(found.admission_wait),
        "ETA off by, median": f"{first} when first told, {half} half-way",
        "errors": ", ".join(f"{count} {kind}" for kind, count in sorted(found.errors.items())) or "none",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _times(half: float | None, most: float | None) -> str:
    return f"p50 {_time(half)}, p95 {_time(most)}"


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.3g} s"


def _share(part: float | None) -> str:
    return "unknown" if part is None else f"{part:.0%}"
