"""A server that is killed in the middle of video jobs, and what the next one saves by going on from checkpoints.

    python -m benchmarks.restart [--jobs 10] [--steps 300] [--output restart.json]

kill -9 of a `denoised serve` with `--jobs-folder` when about half of all steps are done; another is started with the
same folder. All videos must be, to the byte, those of the same requests undisturbed, which the second server makes
afterwards from their start: that is also what a restart without checkpoints would take. Exit code 1 if one is not.
A tiny Wan with random weights; its steps cost as good as nothing, so seconds are mostly those of the videos' files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tests.tiny import checkpoint

from benchmarks.common import show
from benchmarks.processes import Served

MODEL, CHECKPOINT_EVERY, PATIENCE = "wan22_t2v", 5, 600.0
PARAMS = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 1.0, "fps": 8}
_PROMPTS = ("a bird over a lake", "a boat", "two cats", "rain on a roof", "a red car")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of the jobs. `done_before`: completed when the server was killed; steps and seconds are those of the
    others: `steps_after` computed by the next server, `steps_from_zero` without checkpoints."""

    jobs: int
    right: int
    same_jobs_for_same_keys: bool
    done_before: int
    resumed_from: list[int]
    steps_after: int
    steps_from_zero: int
    seconds_after: float
    seconds_from_zero: float

    @property
    def ok(self) -> bool:
        return self.right == self.jobs and self.same_jobs_for_same_keys


class Videos:
    """The jobs of one server."""

    def __init__(self, served: Served) -> None:
        self._http = httpx2.Client(base_url=served.url, timeout=60)

    def __enter__(self) -> Videos:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def create(self, body: dict[str, Any], key: str) -> str:
        """The job of this idempotency key."""
        answer = self._http.post("/v1/videos", json=body, headers={"Idempotency-Key": key}).raise_for_status()
        return str(answer.json()["id"])

    def all(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return [self._http.get(f"/v1/videos/{i}").raise_for_status().json() for i in ids]

    def until(self, ids: Sequence[str], steps: int | None = None) -> float:
        """Wait until so many steps are done in all, and some of each; or, without a number, until all are completed.
        Gives the seconds."""
        began = time.monotonic()
        while not self._far(ids, steps):
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError(f"jobs were not done after {PATIENCE:.0f} s")
            time.sleep(0.02)
        return time.monotonic() - began

    def _far(self, ids: Sequence[str], steps: int | None) -> bool:
        found = self.all(ids)
        failed = [job["error"] for job in found if job["status"] == "failed"]
        if failed:
            raise RuntimeError(f"a job failed: {failed[0]}")
        if steps is None:
            return all(job["status"] == "completed" for job in found)
        done = [job["step"] for job in found]
        return bool(sum(done) >= steps and min(done) > CHECKPOINT_EVERY)

    def content(self, job_id: str) -> bytes:
        return self._http.get(f"/v1/videos/{job_id}/content").raise_for_status().content


def restart(model: str, jobs_folder: Path, *, num_jobs: int, steps: int) -> Result:
    """Begin jobs, kill, go on, and compare with the same undisturbed."""
    arguments = [model, "--skip-warm-up", "--deterministic", "--max-num-seqs", str(num_jobs)]
    arguments += ["--default-sampling-params", json.dumps(PARAMS | {"num_inference_steps": steps})]
    arguments += ["--jobs-folder", str(jobs_folder), "--job-checkpoint-every", str(CHECKPOINT_EVERY)]
    bodies: list[dict[str, Any]] = [{"prompt": _PROMPTS[i % len(_PROMPTS)], "seed": i} for i in range(num_jobs)]
    del bodies[-1]["seed"]  # the server chooses one, and must keep to it
    first = Served(*arguments)
    try:
        with Videos(first) as videos:
            ids = [videos.create(body, f"job {i}") for i, body in enumerate(bodies)]
            videos.until(ids, num_jobs * steps // 2)
    finally:
        first.kill()
    done = _done(jobs_folder)
    second = Served(*arguments)
    try:
        with Videos(second) as videos:
            return _gone_on(videos, ids, done, bodies)
    finally:
        second.kill()


def _done(jobs_folder: Path) -> set[str]:
    """Jobs that were completed when the server was killed, by its own books."""
    with contextlib.closing(sqlite3.connect(jobs_folder / "jobs.sqlite3")) as books:
        return {job_id for (job_id,) in books.execute("SELECT id FROM jobs WHERE done")}


def _gone_on(videos: Videos, ids: list[str], done: set[str], bodies: list[dict[str, Any]]) -> Result:
    same = [videos.create(body, f"job {i}") for i, body in enumerate(bodies)] == ids
    seconds_after = videos.until(ids)
    receipts = [job["receipt"] for job in videos.all(ids)]
    seeded = [body | {"seed": receipt["seed"]} for body, receipt in zip(bodies, receipts, strict=True)]
    left = [number for number, job_id in enumerate(ids) if job_id not in done]
    anew = {number: videos.create(seeded[number], f"anew {number}") for number in left}
    seconds_from_zero = videos.until(list(anew.values()))
    for number in set(range(len(ids))) - anew.keys():
        anew[number] = videos.create(seeded[number], f"anew {number}")
    videos.until(list(anew.values()))
    interrupted = [receipts[number] for number in left]
    return Result(
        jobs=len(ids),
        right=sum(videos.content(ids[number]) == videos.content(other) for number, other in anew.items()),
        same_jobs_for_same_keys=same,
        done_before=len(done),
        resumed_from=[receipt["resumed_from_step"] for receipt in interrupted],
        steps_after=sum(rank["forwards"] for receipt in interrupted for rank in receipt["ranks"]),
        steps_from_zero=sum(receipt["steps"] for receipt in interrupted),
        seconds_after=round(seconds_after, 2),
        seconds_from_zero=round(seconds_from_zero, 2),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="denoised-restart-") as folder:
        model = checkpoint(MODEL, Path(folder) / "model")
        result = restart(str(model), Path(folder) / "jobs", num_jobs=args.jobs, steps=args.steps)
    found = dataclasses.asdict(result)
    show("restart", found)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if result.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
