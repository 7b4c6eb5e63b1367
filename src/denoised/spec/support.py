"""What the contract tests found, model by model: `support.json` beside this file, written by scripts/support_table.py.

Nobody types a tick: a cell is "ok" because a test passed, or says why it is not.
"""

from __future__ import annotations

import json
from pathlib import Path

OK = "ok"
PATH = Path(__file__).with_name("support.json")
Results = dict[str, dict[str, str]]


def results() -> Results:
    """Row to check to "ok" or the reason; empty before the contract tests ran."""
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


def table(found: Results) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and notes. A cell is `yes`, a dash where nothing was checked, or `no` with the number of a note."""
    checks = list(dict.fromkeys(check for cells in found.values() for check in cells))
    notes: list[str] = []
    rows = [[row, *(cell(cells.get(check), notes) for check in checks)] for row, cells in found.items()]
    return ["model", *checks], rows, notes


def cell(value: str | None, notes: list[str]) -> str:
    """`yes`, a dash, or `no` with the number of its note, which is added to `notes`."""
    if value is None:
        return "-"
    if value == OK:
        return "yes"
    if value not in notes:
        notes.append(value)
    return f"no ({notes.index(value) + 1})"
