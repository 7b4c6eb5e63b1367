"""`denoised models`: the support table, as the contract tests last found it."""

from __future__ import annotations

import sys

from denoised.spec import support


def models() -> None:
    """Print which models work with what, as the tests found it."""
    from rich.console import Console
    from rich.table import Table

    found = support.results()
    if not found:
        print("No results of the contract tests are in this installation; scripts/support_table.py puts them there.")
        return
    header, rows, notes = support.table(found)
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: lines are then as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 300)
    console.print(table)
    for number, note in enumerate(notes, start=1):
        console.print(f"({number}) {note}", markup=False, highlight=False)
    console.print("Any other diffusers pipeline runs by its class name, by what it says of itself.", highlight=False)
