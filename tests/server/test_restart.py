"""kill -9 of a server in the middle of ten video jobs: ten right results, and most steps are not computed again."""

from __future__ import annotations

from pathlib import Path

from benchmarks.restart import CHECKPOINT_EVERY, MODEL, restart

from tests.contract.support import folder

JOBS, STEPS = 10, 25


def test_ten_jobs_go_on_from_their_checkpoints_to_the_bytes_of_undisturbed_ones(tmp_path: Path) -> None:
    found = restart(folder(MODEL), tmp_path, num_jobs=JOBS, steps=STEPS)
    assert found.right == JOBS
    assert found.same_jobs_for_same_keys, "who asks again after the crash gets the job that is there"
    assert found.done_before <= JOBS // 2, "most were in the middle"
    assert len(found.resumed_from) == JOBS - found.done_before
    assert all(CHECKPOINT_EVERY <= step <= STEPS for step in found.resumed_from), found.resumed_from
    assert found.steps_from_zero == STEPS * len(found.resumed_from)
    saved = sum(found.resumed_from)
    assert found.steps_after == found.steps_from_zero - saved, "a forward each, and only of what was left"
    assert saved > found.steps_from_zero // 4
    assert not list((tmp_path / "checkpoints").iterdir()), "nobody goes on with what is done"
