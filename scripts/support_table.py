"""Writes the support table of README.md from the results of the contract tests.

    pytest tests/contract --support src/denoised/spec/support.json
    python scripts/support_table.py

With a file as its argument, that file's results are taken into the package first. `--check` writes nothing, and fails
if README.md is not up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from denoised.spec import support

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- support-table:start -->", "<!-- support-table:end -->"


def main(arguments: list[str]) -> int:
    files = [Path(a) for a in arguments if not a.startswith("-")]
    if files:
        support.PATH.write_text(json.dumps(json.loads(files[0].read_text()), indent=1) + "\n")
    old = README.read_text()
    new = replaced(old, markdown(support.results()))
    if "--check" in arguments:
        return int(old != new)
    README.write_text(new)
    return 0


def replaced(text: str, table: str) -> str:
    """`text` with `table` between the markers."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table}{END}{after}"


def markdown(found: support.Results) -> str:
    """The table and its notes, or a line that says that there are no results yet."""
    if not found:
        return "The contract tests have not been run on this version yet.\n"
    header, rows, notes = support.table(found)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(["", *lines, "", *(f"({i}) {note}  " for i, note in enumerate(notes, start=1))]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
