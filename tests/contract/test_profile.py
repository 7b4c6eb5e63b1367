"""Traces: one file a rank, with the stages of the engine in it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.contract.support import ask, engine


def test_a_trace_for_each_rank_names_the_stages(tmp_path: Path) -> None:
    with engine("qwen_image", ranks=2) as omni:
        omni.start_profile()
        (output,) = ask(omni, "qwen_image", [0], "pt")
        paths = omni.stop_profile(str(tmp_path / "traces"))
    assert output.error is None
    assert [Path(p).name for p in paths] == ["trace-rank-0.json", "trace-rank-1.json"]
    for path in paths:
        names = {event.get("name") for event in json.loads(Path(path).read_text())["traceEvents"]}
        assert {
            "denoise",
            "agree",
            "exchange",
            "advance",
            "encode: text_encoder.forward",
            "decode: vae.decode",
        } <= names
