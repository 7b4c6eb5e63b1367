"""Writes docs/options.md: every option of the Python API and its flag, from the dataclasses that declare them.

python scripts/options_table.py [--check]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from denoised.cli import flags
from denoised.cli.serve import SERVER
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.request import OmniDiffusionSamplingParams
from denoised.server.settings import ServerConfig

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
HEAD = """# Options

Made by `scripts/options_table.py` from the dataclasses. Flags may be written with `-` or with `_`.
"""
SECTIONS = (
    ("`Omni(...)`", EngineConfig, flags.ENGINE),
    ("`DiffusionParallelConfig(...)`", DiffusionParallelConfig, flags.PARALLEL),
    ("`OmniDiffusionSamplingParams(...)`", OmniDiffusionSamplingParams, flags.SAMPLING),
    ("`denoised serve`", ServerConfig, SERVER),
)


def page() -> str:
    parts = [HEAD]
    for title, owner, table in SECTIONS:
        rows = [_row(field, table) for field in dataclasses.fields(owner)]
        parts.append(f"\n## {title}\n\n| option | flag | default | range | |\n|---|---|---|---|---|\n" + "".join(rows))
    return "".join(parts)


def _row(field: dataclasses.Field[Any], table: dict[str, flags.Flag]) -> str:
    flag = ", ".join(f"`{spelling}`" for spelling in table[field.name].spellings) if field.name in table else ""
    missing = field.default is dataclasses.MISSING
    default = "" if missing or field.default in (None, ()) or field.name == "parallel_config" else f"`{field.default}`"
    return f"| `{field.name}` | {flag} | {default} | {_range(field)} | {field.metadata['help']} |\n"


def _range(field: dataclasses.Field[Any]) -> str:
    low, high, choices = (field.metadata[name] for name in ("minimum", "maximum", "choices"))
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if high is None:
        return "" if low is None else f"≥ {low}"
    return f"{low} to {high}"


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
