"""Orders to load adapters: who has answered, what all are told, and answers that come before the order."""

from __future__ import annotations

import pytest

from denoised.errors import EngineError, InvalidRequestError
from denoised.runtime.lora_orders import GONE, Ask, Orders, verdict
from denoised.runtime.protocol import LoraDone

OK, REFUSED = LoraDone(), LoraDone(problem="does not fit.")


def heard(orders: Orders, *said: tuple[int, LoraDone], keeps: bool = False) -> None:
    for replica, event in said:
        orders.heard(replica, event, keeps=keeps)


def test_an_order_ends_when_every_replica_has_answered_it() -> None:
    """Two orders at once: each replica answers them in turn, one of them long before the other."""
    orders, first, second = Orders(), list[list[str]](), list[list[str]]()
    orders.make(first.append, [0, 1])
    orders.make(second.append, [0, 1])
    heard(orders, (0, OK), (0, REFUSED))
    assert (first, second) == ([], [])
    heard(orders, (1, OK))
    assert (first, second) == ([["", ""]], [])
    heard(orders, (1, REFUSED))
    assert second == [["does not fit."] * 2]


def test_a_replica_that_dies_leaves_its_orders_to_the_others() -> None:
    orders, done = Orders(), list[list[str]]()
    orders.make(done.append, [0, 1])
    orders.make(done.append, [0, 1])
    orders.gone(1)
    heard(orders, (0, OK), (0, OK))
    assert done == [[GONE, ""], [GONE, ""]] or done == [["", GONE], ["", GONE]]
    orders.make(done.append, [])
    assert done[-1] == []


def test_answers_that_come_before_their_orders_are_kept_in_order_for_programs_that_are_late() -> None:
    orders, done = Orders(), list[list[str]]()
    heard(orders, (0, OK), (0, REFUSED), keeps=True)
    orders.make(done.append, [0])
    orders.make(done.append, [0])
    orders.make(done.append, [0])
    assert done == [[""], ["does not fit."]], "the third has no answer yet"
    heard(orders, (0, OK), keeps=True)
    assert done[2:] == [[""]]
    heard(orders, (0, REFUSED))  # nobody else keeps what nobody asked
    orders.make(done.append, [0])
    assert len(done) == 3


@pytest.mark.parametrize(
    ("problems", "told"),
    [(["", ""], ""), (["", GONE], ""), ([GONE, GONE], GONE), ([], GONE), ([GONE, "x", ""], "x")],
)
def test_the_programs_that_follow_hear_what_the_leader_hears(problems: list[str], told: str) -> None:
    """One replica that could act is enough; none, or one that refused, is an error for all programs alike."""
    assert verdict(problems) == told
    expected = {"": None, GONE: EngineError, "x": InvalidRequestError}[told]
    for said in (problems, [verdict(problems)]):
        ask = Ask()
        ask.done(said)
        if expected is None:
            ask.wait()
        else:
            with pytest.raises(expected):
                ask.wait()
