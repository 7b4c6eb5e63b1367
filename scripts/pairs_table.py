"""Writes the table of pairs in docs/parallel.md from docs/pairs.json, which the contract tests' results go to.

    pytest tests/contract --full --support /tmp/support.json
    python scripts/pairs_table.py /tmp/pairs.json

With a file as its argument, that file's results are taken into docs/pairs.json first. `--check` writes nothing, and
fails if the page is not up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from denoised.spec import support

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS = DOCS / "parallel.md", DOCS / "pairs.json"
START, END = "<!-- pairs:start -->", "<!-- pairs:end -->"
# Methods that are axes of ranks or act over them, and features that go with ranks.
ORDER = (
    *("cfg", "ulysses", "ring", "tensor", "pipeline", "hsdp", "expert", "text_encoder_tp", "vae_patch", "data"),
    *("cache", "quantization", "lora", "cpu_offload", "layerwise_offload", "compile", "attention_backend"),
)


def main(arguments: list[str]) -> int:
    files = [Path(a) for a in arguments if not a.startswith("-")]
    if files:
        RESULTS.write_text(json.dumps(json.loads(files[0].read_text()), indent=1, sort_keys=True) + "\n")
    old = PAGE.read_text()
    before, rest = old.split(START)
    new = f"{before}{START}\n{markdown(json.loads(RESULTS.read_text()))}{END}{rest.split(END)[1]}"
    if "--check" in arguments:
        return int(old != new)
    PAGE.write_text(new)
    return 0


def markdown(found: dict[str, str]) -> str:
    """Each pair once, below the diagonal; reasons are numbered notes under the table."""
    notes: list[str] = []
    rows = [
        [
            name,
            *(support.cell(_found(found, name, other), notes) for other in ORDER[:number]),
            *[""] * (len(ORDER) - 1 - number),
        ]
        for number, name in enumerate(ORDER)
        if number
    ]
    header = ["", *ORDER[:-1]]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(["", *lines, "", *(f"({i}) {note}  " for i, note in enumerate(notes, start=1))]) + "\n"


def _found(found: dict[str, str], a: str, b: str) -> str | None:
    return found.get(f"{a} + {b}") or found.get(f"{b} + {a}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
