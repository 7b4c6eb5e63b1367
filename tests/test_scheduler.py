"""Admission in order, within the bound, and what happens after a crash."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from denoised.runtime.scheduler import GIVE_UP_AFTER, Scheduler


def filled(size: int, names: str) -> Scheduler:
    scheduler = Scheduler(size)
    for name in names:
        scheduler.add(name)
    return scheduler


def test_first_come_first_served_within_the_bound() -> None:
    scheduler = filled(2, "abcd")
    assert scheduler.admit() == ["a", "b"]
    assert scheduler.admit() == []
    assert scheduler.remove("a")
    assert scheduler.admit() == ["c"]
    assert not scheduler.remove("d"), "a waiting request was not running"
    assert scheduler.num_waiting == 0


def test_after_a_crash_requests_run_again_in_their_order() -> None:
    scheduler = filled(2, "abc")
    scheduler.admit()
    assert scheduler.crashed() == (["a", "b"], [])
    assert scheduler.admit() == ["a", "b"]


def test_who_crashes_again_and_again_is_found_by_running_alone() -> None:
    """`b` kills the ranks whenever it runs; everybody else ends well."""
    scheduler, done, given_up = filled(3, "abcd"), [], []
    while scheduler.admit() or scheduler.running:
        if "b" in scheduler.running:
            given_up += scheduler.crashed()[1]
        else:
            done += scheduler.running
            for name in list(scheduler.running):
                scheduler.remove(name)
    assert given_up == ["b"]
    assert sorted(done) == ["a", "c", "d"]


@given(st.integers(1, 4), st.lists(st.sampled_from(["add", "admit", "end", "crash"]), max_size=60))
def test_never_more_than_the_bound_and_nothing_is_lost(size: int, actions: list[str]) -> None:
    scheduler, known, count = Scheduler(size), set(), 0
    for action in actions:
        if action == "add":
            scheduler.add(str(count))
            known.add(str(count))
            count += 1
        elif action == "end" and scheduler.running:
            known.discard(scheduler.running[0])
            scheduler.remove(scheduler.running[0])
        elif action == "crash":
            known -= set(scheduler.crashed()[1])
        scheduler.admit()
        assert len(scheduler.running) <= size
        assert len(scheduler.running) + scheduler.num_waiting == len(known)
    assert GIVE_UP_AFTER > 1
