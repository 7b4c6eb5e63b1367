"""The real command line, called in this process."""

from __future__ import annotations

import os
from pathlib import Path

from typer.testing import CliRunner, Result

from denoised.cli import app

_RUNNER = CliRunner(env={"TERM": "dumb", "COLUMNS": "200", "NO_COLOR": "1"})


def denoised(*arguments: object) -> Result:
    """Run `denoised` with these arguments; gives exit code, stdout and stderr."""
    return _RUNNER.invoke(app, [str(a) for a in arguments], prog_name="denoised")


def refused(folder: Path, *arguments: object) -> str:
    """The one line that a refused `denoised generate` says. It exits with 2 and leaves nothing in `folder`."""
    before = sorted(os.listdir(folder))
    result = denoised("generate", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(folder)) == before
    return result.stderr.removeprefix("Error: ").strip()
