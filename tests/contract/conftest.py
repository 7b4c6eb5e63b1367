"""Collects which cell of the support table passed, and which pair of features; `--support FILE` adds the cells to that
file, and the pairs to `pairs.json` beside it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.support import MODELS, ORDER

# The columns of the table, in this order, before any that are not named here.
COLUMNS = (
    *("alone", "interleaved", "joined", "cancel", "cfg2", "cfg3", "both ranks busy"),
    *("ulysses", "ring", "tensor", "pipeline", "hsdp", "text_encoder_tp", "vae_patch"),
)

# Rows of which every cell is run by CI: double stream, batched guidance, single stream, video, and one without a spec.
WHOLE_ROWS = frozenset({"qwen_image", "sd3", "flux_true_cfg", "wan22_t2v", "sdxl"})
# Columns of which it runs every fourth cell only, from this row on: for tiles, rows that read pictures and videos.
QUARTERS = {"text_encoder_tp": 1, "vae_patch": 2}

_results: dict[str, dict[str, str]] = {}
_pairs: dict[str, str] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the other rows CI runs every second cell, of each row and of each column; the full run has them all."""
    for item in items:
        marker = item.get_closest_marker("cell")
        if marker is not None:
            params = item.callspec.params  # type: ignore[attr-defined]
            if _is_slow(params["name"], marker.args[0].format(**params)):
                item.add_marker(pytest.mark.slow)


def _is_slow(row: str, column: str) -> bool:
    number = ORDER.index(row)
    if column in QUARTERS:
        return number % 4 != QUARTERS[column]
    return row not in WHOLE_ROWS and (number + zlib.crc32(column.encode())) % 2 == 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    marker = item.get_closest_marker("cell")
    if marker and report.when == "call":
        name = item.callspec.params["name"]  # type: ignore[attr-defined]
        cell = marker.args[0].format(**item.callspec.params)  # type: ignore[attr-defined]
        found = dict(item.user_properties).get("refused", "ok") if report.passed else "failed"
        _results.setdefault(name, {})[cell] = str(found)
    for marker in item.iter_markers("pair") if report.when == "call" and not report.skipped else ():
        first, second = (arg.format(**getattr(item, "callspec", _NoParams).params) for arg in marker.args)
        found = dict(item.user_properties).get("refused", "ok") if report.passed else "failed"
        if _pairs.get(f"{first} + {second}") != "failed":  # of several models
            _pairs[f"{first} + {second}"] = str(found)
    return report


class _NoParams:
    params: dict[str, Any] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support")
    if path and _results:
        Path(path).write_text(json.dumps(_with_earlier(Path(path)), indent=1) + "\n")
    if path and _pairs:
        pairs = Path(path).with_name("pairs.json")
        pairs.write_text(json.dumps(_read(pairs) | _pairs, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() and path.read_text() else {}  # type: ignore[no-any-return]


def _with_earlier(path: Path) -> dict[str, dict[str, str]]:
    """What the file has, and what was found now: parts of a long run may come one after another."""
    earlier = _read(path)
    found = {MODELS[name]: cells for name, cells in _results.items()}
    rows = [MODELS[name] for name in ORDER if MODELS[name] in earlier or MODELS[name] in found]
    return {row: _in_order({**earlier.get(row, {}), **found.get(row, {})}) for row in rows}


def _in_order(cells: dict[str, str]) -> dict[str, str]:
    return {name: cells[name] for name in (*COLUMNS, *cells) if name in cells}
