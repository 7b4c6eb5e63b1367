"""The command line. Nothing heavy is imported before a command needs it: `denoised --help` answers at once."""

from __future__ import annotations

from denoised.cli.app import app, main

__all__ = ["app", "main"]
