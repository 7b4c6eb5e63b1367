"""A Deferred behaves as the value it stands for, and waits as long as the program lets it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from denoised.steps.deferred import Deferred, Source, plain


class Clock:
    """Counts how often the program had to wait; each wait resolves everything that is pending."""

    def __init__(self) -> None:
        self.waits = 0
        self.pending: list[tuple[Source, Any]] = []

    def call(self, value: Any, arity: int | None = None) -> Deferred:
        source = Source(self.wait, arity)
        self.pending.append((source, value))
        return Deferred.of(source)

    def wait(self) -> None:
        self.waits += 1
        for source, value in self.pending:
            source.resolve(value)
        self.pending.clear()


def test_guidance_arithmetic_waits_once_for_both_branches() -> None:
    clock = Clock()
    c, u = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    cond, uncond = clock.call((c,), 1)[0], clock.call((u,), 1)[0]
    combined = uncond + 4.0 * (cond - uncond)
    combined = combined * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    assert clock.waits == 0, "arithmetic alone must not stop the program"
    expected = u + 4.0 * (c - u)
    expected = expected * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(expected, dim=-1, keepdim=True))
    assert torch.equal(plain(combined), expected)
    assert clock.waits == 1


def test_outputs_unpack_without_waiting_when_their_number_is_known() -> None:
    clock = Clock()
    video, audio = clock.call((torch.ones(2), torch.zeros(3)), arity=2)
    first, second = clock.call(torch.arange(4.0)).chunk(2)
    assert clock.waits == 0
    assert plain(video).shape == (2,)
    assert plain(audio).shape == (3,)
    assert plain([first, second])[1].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "look",
    [
        lambda d: bool((d > 100).any()),
        lambda d: d.shape,
        lambda d: float(d.sum()),
        lambda d: [x for x in d],  # noqa: C416
        lambda d: d.mul_(2),
        lambda d: d.__setitem__(0, 1.0),
        lambda d: torch.randn_like(d),
        lambda d: len(d),
    ],
)
def test_looking_at_the_value_waits(look: Any) -> None:
    clock = Clock()
    look(clock.call(torch.arange(4.0)))
    assert clock.waits == 1


def test_in_place_change_of_a_recorded_input_is_an_error_and_not_a_wrong_picture() -> None:
    clock, other = Clock(), torch.ones(3)
    total = clock.call(torch.ones(3)) + other
    other.add_(1)
    with pytest.raises(RuntimeError, match="defer=False"):
        plain(total)


def test_error_of_the_call_is_raised_where_the_value_is_looked_at() -> None:
    source = Source(lambda: source.fail(ValueError("broken")))
    later = Deferred.of(source) * 2
    with pytest.raises(ValueError, match="broken"):
        plain(later)


def test_numpy_scalars_and_real_tensors_on_the_left() -> None:
    clock = Clock()
    value = torch.arange(3.0)
    results = [
        np.float64(2.0) * clock.call(value),
        torch.ones(3) - clock.call(value),
        torch.cat([value, clock.call(value)]),
    ]
    assert clock.waits == 0
    assert plain(results[0]).tolist() == [0.0, 2.0, 4.0]
    assert plain(results[1]).tolist() == [1.0, 0.0, -1.0]
    assert plain(results[2]).shape == (6,)


OPERATIONS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: y - x,
    "mul": lambda x, y: x * 0.5 + y,
    "div": lambda x, y: x / (y.abs() + 1.0),
    "neg": lambda x, y: -x,
    "row": lambda x, y: x[:, :2].repeat(1, 2),
    "float": lambda x, y: x.float().to(torch.float64).float(),
    "where": lambda x, y: torch.where(x > y, x, y),
    "stack": lambda x, y: torch.stack([x, y]).mean(0),
    "chunk": lambda x, y: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1),
    "permute": lambda x, y: x.permute(1, 0).reshape(4, 4),
    "clamp": lambda x, y: torch.clamp(x, -1, 1),
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=8))
def test_any_chain_of_operations_equals_the_eager_one(names: list[str]) -> None:
    clock, eager, other = Clock(), torch.randn(4, 4), torch.randn(4, 4)
    lazy = clock.call(eager)
    for name in names:
        eager, lazy = OPERATIONS[name](eager, other), OPERATIONS[name](lazy, other)
    assert torch.equal(plain(lazy), eager)


def _scale(lazy: Any) -> None:
    lazy.mul_(3)


def _add(lazy: Any) -> None:
    lazy += 1


def _set(lazy: Any) -> None:
    lazy[0] = 7.0


@pytest.mark.parametrize("change", [_scale, _add, _set])
def test_in_place_change_of_a_prediction_is_never_seen_by_an_earlier_use(change: Any) -> None:
    """`double` was written before the change: a wrong picture would follow, so it is an error."""
    prediction = Clock().call(torch.ones(3))
    double = prediction * 2
    change(prediction)
    with pytest.raises(RuntimeError, match="defer=False"):
        plain(double)
    assert plain(prediction * 2).tolist() == (prediction.force() * 2).tolist(), "a later use sees it"


def test_in_place_operator_changes_the_tensor_that_other_names_see() -> None:
    prediction = Clock().call((torch.ones(3),), 1)[0]
    same = prediction
    prediction += 1
    assert plain(same).tolist() == [2.0, 2.0, 2.0]


def test_later_use_of_a_changed_prediction_beside_a_pending_one() -> None:
    clock = Clock()
    first = clock.call(torch.ones(2))
    first.mul_(3)
    total = first + clock.call(torch.ones(2))
    assert plain(total).tolist() == [4.0, 4.0]


def test_protocols_of_other_libraries_see_the_value() -> None:
    clock = Clock()
    assert np.asarray(clock.call(torch.arange(3.0))).tolist() == [0.0, 1.0, 2.0]
    assert copy.deepcopy(clock.call(torch.arange(3.0))).tolist() == [0.0, 1.0, 2.0]
    assert copy.copy([clock.call(torch.ones(1))]) is not None
    assert list(range(clock.call(torch.tensor(3)))) == [0, 1, 2]
    mask = clock.call(torch.tensor([True, False])) & torch.tensor([True, True])
    assert plain(mask).tolist() == [True, False]


def test_random_numbers_are_drawn_in_program_order() -> None:
    clock, generator = Clock(), torch.Generator().manual_seed(0)
    torch.nn.functional.dropout1d(clock.call(torch.ones(2, 2)))
    assert clock.waits == 1
    torch.bernoulli(clock.call(torch.ones(2)) * 0.5, generator=generator)
    assert clock.waits == 2
