"""Writes the table of predicted and measured steps in docs/plan.md, from what benchmarks/plan_check.py found.

python scripts/plan_table.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULT = DOCS / "plan.md", DOCS / "plan_check.json"
BEGIN, END = "<!-- plan_check -->\n", "<!-- /plan_check -->\n"


def table(found: dict[str, Any]) -> str:
    """The layouts by measured time, and how good the predictions are."""
    hardware = found["hardware"]
    head = (
        f"On {found['machine']}: one thread a rank, {hardware['half_flops'] / hardware['cores'] / 1e9:.0f} GFLOP/s a "
        f"core, of which attention reaches {hardware['attention_efficiency']:.2f} and all else in blocks "
        f"{hardware['efficiency']:.2f}; two ranks at once keep {hardware['crowding']:.2f} of that:\n\n"
    )
    rows = "".join(_row(name, found) for name in sorted(found["seconds"], key=found["seconds"].__getitem__))
    quality = (
        f"\nRank correlation {found['rank_correlation']:.2f}, median error {found['median_error']:.0%}, largest "
        f"{found['largest_error']:.0%}.\n"
    )
    quality += f"\n{found['note']}\n" if found.get("note") else ""
    return f"{head}| layout | measured s a step | predicted | error |\n|---|---|---|---|\n{rows}{quality}"


def _row(name: str, found: dict[str, Any]) -> str:
    seconds, predicted = found["seconds"][name], found["predicted"][name]
    return f"| {name} | {seconds:.3f} | {predicted:.3f} | {predicted / seconds - 1:+.0%} |\n"


def page() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + table(json.loads(RESULT.read_text())) + END + after


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
