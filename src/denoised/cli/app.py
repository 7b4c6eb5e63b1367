"""The commands, and how they end: a result, one sentence on stderr with exit code 2, or 130 after Ctrl-C."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from denoised import __version__
from denoised.cli.bench import bench
from denoised.cli.calibrate import calibrate
from denoised.cli.generate import generate
from denoised.cli.models import models
from denoised.cli.plan import plan
from denoised.cli.serve import serve
from denoised.errors import DenoisedError, one_line

FAILED = 2
INTERRUPTED = 130


class _Commands(TyperGroup):
    """Ends every command in the same way, whoever calls it: the entry point, `python -m`, or a test."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if os.environ.get("DENOISED_DEBUG") == "1" and not _is_users(error):
                raise
            code = _tell(error)
        if code == INTERRUPTED:
            print("Stopped.", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def _is_users(error: Exception) -> bool:
    """The command line or the settings are at fault, so that a traceback would not help anyone."""
    return isinstance(error, DenoisedError) or hasattr(error, "format_message")


def _tell(error: Exception) -> int:
    """Print `error` as one sentence; gives the exit code."""
    if hasattr(error, "format_message"):
        text = " ".join(error.format_message().split())
    else:
        text = one_line(error, limit=1000)
        text += "" if _is_users(error) else " (a bug: DENOISED_DEBUG=1 shows where)"
    if text:  # without arguments there is nothing to say beyond the help text
        print(f"Error: {text}", file=sys.stderr)
    return FAILED


def _version(wanted: bool) -> None:
    if wanted:
        print(f"denoised {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    # One declaration serves both spellings: --cfg-parallel-size and --cfg_parallel_size.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.command()(bench)
app.command()(calibrate)
app.command()(generate)
app.command()(models)
app.command()(plan)
app.command()(serve)


@app.callback()
def denoised(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pictures, videos and sound from diffusion models: diffusers pipelines, unmodified, on one rank or many."""


def main() -> None:
    """The entry point of the `denoised` command."""
    app(prog_name="denoised")
