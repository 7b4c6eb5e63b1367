"""Chrome traces of a rank, with the engine's stages named. Load them in chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

stage = record_function
"""Names a part of the engine's work in a trace; costs microseconds where no trace is taken."""


class RankProfiler:
    """At most one trace at a time; a second start is ignored until the first is written."""

    def __init__(self) -> None:
        self._profile: profile | None = None

    def start(self) -> None:
        if self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def stop(self, folder: str, rank: int) -> str | None:
        """Write `trace-rank-N.json` into `folder`; its path, or None if no trace was started."""
        if self._profile is None:
            return None
        path = Path(folder) / f"trace-rank-{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        return str(path)
