"""Who watches which job: each is woken when there is news of it. What the news are is in the job's record; here are
only the previews, which no record holds, until the job ends.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from denoised.outputs import Preview
from denoised.server import pictures


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A preview as events bring it: the first frame, as PNG in base64."""

    index: int
    step: int
    b64_json: str
    size: str


class Watchers:
    """Watchers by job. Used on the event loop's thread alone."""

    def __init__(self) -> None:
        self.closed = False
        self._bells: dict[str, set[asyncio.Event]] = collections.defaultdict(set)
        self._previews: dict[str, list[Shown]] = {}

    @contextlib.contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever there is news; whoever waits for it clears it."""
        bell = asyncio.Event()
        self._bells[job_id].add(bell)
        try:
            yield bell
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    @property
    def num_watching(self) -> int:
        return sum(len(bells) for bells in self._bells.values())

    def news(self, job_id: str) -> None:
        """Wake who watches the job."""
        for bell in self._bells.get(job_id, ()):
            bell.set()

    async def preview(self, job_id: str, preview: Preview) -> None:
        """Keep it for all who watch, also those who come later."""
        frame = _picture(preview.images[0])
        [raw] = await asyncio.to_thread(pictures.encode_all, [frame], "png", None, opaque=True)
        shown = Shown(index=preview.index, step=preview.step, b64_json=raw, size=f"{frame.width}x{frame.height}")
        self._previews.setdefault(job_id, []).append(shown)
        self.news(job_id)

    def previews(self, job_id: str) -> list[Shown]:
        """Those that were made, in order; none of a job that ended."""
        return self._previews.get(job_id, [])

    def ended(self, job_id: str) -> None:
        """The job is done or forgotten."""
        self._previews.pop(job_id, None)
        self.news(job_id)

    def close(self) -> None:
        """All streams end; their jobs may go on in another server."""
        self.closed = True
        for job_id in list(self._bells):
            self.news(job_id)


def _picture(frame: Any) -> Any:
    """Frames come as pictures, or as arrays [height, width, 3] of bytes or of numbers from 0 to 1."""
    if not hasattr(frame, "shape"):
        return frame
    from PIL import Image

    return Image.fromarray(frame if frame.dtype == "uint8" else (frame * 255).round().astype("uint8"))
