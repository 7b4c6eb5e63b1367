"""What the command line shows while it waits. Only on a terminal: logs get results, not animation."""

from __future__ import annotations

import contextlib
import sys


def loading(model: str) -> contextlib.AbstractContextManager[object]:
    """A spinner on stderr while a model is loaded."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"loading {escape(model)}")
