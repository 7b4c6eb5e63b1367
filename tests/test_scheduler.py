"""Admission in order, within the bound, and what happens after a crash."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoised.errors import QueueFullError
from denoised.request import Service
from denoised.runtime.intake import Intake
from denoised.runtime.room import Need
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


def test_order_is_priority_then_tenants_by_weight_then_deadline_then_arrival() -> None:
    scheduler = Scheduler(1)
    asks = {
        "a1": Service(tenant="a"),
        "a2": Service(tenant="a"),
        "a3": Service(tenant="a", timeout=50),
        "b1": Service(tenant="b", weight=2.0),
        "b2": Service(tenant="b", weight=2.0),
        "b3": Service(tenant="b", weight=2.0),
        "high": Service(tenant="b", priority=1, weight=2.0),
    }
    scheduler.add("running")
    assert scheduler.admit() == ["running"]
    for name, service in asks.items():
        scheduler.add(name, service=service, seconds=10.0)
    expected = ["running", "high", "a3", "b1", "a1", "b2", "b3", "a2"]
    assert [entry.request_id for entry in scheduler.queue()] == expected[1:], "as it is told"
    started = []
    for name in expected:
        assert scheduler.running == [name], "as it happens"
        scheduler.remove(name)
        started += scheduler.admit()


def test_a_tenant_is_charged_what_it_took_and_not_what_was_predicted() -> None:
    scheduler = Scheduler(1)
    for name in ("a1", "b1", "a2", "b2"):
        scheduler.add(name, service=Service(tenant=name[0]), seconds=1.0)
    assert scheduler.admit() == ["a1"]
    scheduler.remove("a1", seconds=100.0)
    assert scheduler.admit() == ["b1"]
    scheduler.remove("b1", seconds=1.0)
    assert scheduler.admit() == ["b2"], "a has had far more"


def test_nobody_starves_behind_a_tenant_with_many_requests() -> None:
    """Whatever the others queue, a tenant's first request starts after at most one of each."""
    scheduler = Scheduler(1)
    for number in range(100):
        scheduler.add(f"a{number}", service=Service(tenant="a"), seconds=1.0)
    assert scheduler.admit() == ["a0"]
    scheduler.add("b0", service=Service(tenant="b"), seconds=50.0)
    for started in ("a0", "a1"):
        scheduler.remove(started)
        if scheduler.admit() == ["b0"]:
            return
    raise AssertionError("b0 still waits")


def test_deadlines() -> None:
    scheduler = filled(1, "a")
    scheduler.admit()
    scheduler.add("b", service=Service(timeout=5.0), now=10.0)
    scheduler.add("c", service=Service(timeout=3.0), now=11.0)
    assert scheduler.next_deadline() == 14.0
    assert scheduler.expired(13.9) == []
    assert scheduler.expired(14.0) == ["c"]
    scheduler.remove("a")
    assert scheduler.admit() == ["c"], "the nearer deadline"
    assert sorted(scheduler.expired(15.0)) == ["b", "c"], "what runs has one too"
    scheduler.stopping("c")
    assert scheduler.expired(15.0) == ["b"], "told once"


def test_what_does_not_fit_waits_and_nobody_overtakes_it() -> None:
    scheduler = Scheduler(4, room=100.0)
    small, large = Need(resident=10, working=20), Need(resident=10, working=75)
    for name, need in {"s1": small, "s2": small, "large": large, "s3": small}.items():
        scheduler.add(name, need=need)
    assert scheduler.admit() == ["s1", "s2"], "30 resident and 75 working are too much"
    scheduler.remove("s1")
    assert scheduler.admit() == ["large"]
    assert scheduler.admit() == []
    scheduler.remove("large")
    assert scheduler.admit() == ["s3"]


def test_intake_counts_what_waits_and_says_when_to_come_back() -> None:
    intake = Intake(2, 100.0, capacity=1)
    for name in "abc":
        intake.enter(name, 30.0, bounded=True)
    intake.next_start = 12.0
    with pytest.raises(QueueFullError, match="max_queue_len=2: .* ask again in 12 s") as refused:
        intake.enter("d", 1.0, bounded=True)
    assert refused.value.retry_after == 12.0
    intake.enter("d", 1.0, bounded=False)
    intake.leave("d")
    intake.start("a")
    intake.leave("a")
    with pytest.raises(QueueFullError, match="max_queue_seconds=100: 60 s of work wait already; ask again in 40 s"):
        intake.enter("e", 80.0, bounded=True)
    intake.enter("e", 30.0, bounded=True)
