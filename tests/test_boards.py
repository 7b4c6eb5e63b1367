"""Memory that ranks share: the same values as messages give, for all sizes and dtypes; who is gone is noticed."""

from __future__ import annotations

import mmap
import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from denoised.steps import boards, collectives, shared_memory
from denoised.steps.shared_memory import RankGoneError, SharedMemory
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def everything(rank: int, size: int) -> list[Tensor]:
    """Each collective, on values that tell ranks and places apart."""
    group, out = dist.group.WORLD, []
    assert group is not None
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = (torch.arange(24).view(2, 3, 4) % 5 + rank).to(dtype)
        out += collectives.gather_list(x.transpose(0, 2), group)
        out.append(collectives.broadcast(x, group, source=size - 1))
        assert out[-1].data_ptr() != x.data_ptr(), "a tensor of its own, on all ranks"
        out += collectives.Shift([x[0, 0, :3], x.double(), x[:, :1]], group).wait()
        parts = [x.reshape(-1)[: rank + r + 1] for r in range(size)]
        out += collectives.all_to_all(parts, [torch.Size([rank + r + 1]) for r in range(size)], group)
        out += [collectives.all_reduce(x, group)] if dtype is not torch.bool else []
    out.append(collectives.all_gather(torch.ones(rank + 1) * rank, group, dim=0, sizes=range(1, size + 1)))
    return [*out, collectives.all_reduce(torch.tensor(2.0**rank), group)]


def with_messages(rank: int, size: int) -> list[Tensor]:
    shared_memory.is_possible, possible = lambda: False, shared_memory.is_possible
    try:
        assert boards.board_of(_world(), CPU) is None
        return everything(rank, size)
    finally:
        shared_memory.is_possible = possible


def with_a_board(rank: int, size: int) -> list[Tensor]:
    board = boards.board_of(_world(), CPU)
    assert board is not None
    out = [everything(rank, size) for _ in range(3)]
    assert board._turn > 3 * len(out[0]) / 4, "the board was used"
    assert all(torch.equal(a, b) for again in out[1:] for a, b in zip(out[0], again, strict=True))
    return out[0]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_as_messages(size: int) -> None:
    for ours, theirs in zip(run_on_ranks(with_a_board, size), run_on_ranks(with_messages, size), strict=True):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)


def too_large(rank: int, size: int) -> None:
    """One rank's parts do not fit: all send messages, and the board goes on."""
    lengths = [boards.SLOT_BYTES // 4 + 8 if (rank, r) == (1, 0) else 5 for r in range(size)]
    shapes = [torch.Size([boards.SLOT_BYTES // 4 + 8 if (r, rank) == (1, 0) else 5]) for r in range(size)]
    parts = [torch.full((n,), float(rank)) for n in lengths]
    for r, part in enumerate(collectives.all_to_all(parts, shapes, _world())):
        assert part.shape == shapes[r]
        assert bool((part == r).all())
    big = torch.full((boards.SLOT_BYTES // 4 + 1,), 1.0)
    assert float(collectives.all_reduce(big, _world())[-1]) == size
    assert float(collectives.all_reduce(torch.ones(1), _world())) == size


def test_what_does_not_fit_travels_as_messages() -> None:
    run_on_ranks(too_large, 2)


def many_turns(rank: int, size: int) -> None:
    """Ranks that are slow in turn never see a later turn's bytes."""
    for turn in range(60):
        time.sleep(0.002 if turn % size == rank else 0)
        parts = collectives.gather_list(torch.tensor([turn, rank]), _world())
        assert torch.stack(parts).tolist() == [[turn, r] for r in range(size)]


def test_turns_are_kept_apart() -> None:
    run_on_ranks(many_turns, 4)  # more than this machine may have cores


def letters(rank: int, size: int) -> int:
    """More than there are slots, both ways at once, taken in another order than they were expected."""
    collectives.all_reduce(torch.ones(1), _world())  # makes the board
    other, num = 1 - rank, 3 * boards.NUM_LETTERS
    likes = [torch.empty(n + 1, 2, dtype=torch.bfloat16) for n in range(num)]
    arriving = [collectives.Arriving(like, _world(), source=other) for like in likes]
    posted = [
        collectives.Posted(torch.full_like(like, 10 * rank + n), _world(), to=other) for n, like in enumerate(likes)
    ]
    for letter in posted:
        letter.wait()
    collectives.all_reduce(torch.ones(1), _world())  # a wait for anything else does not need them to be read
    for n in reversed(range(num)):
        assert arriving[n].wait().tolist() == torch.full_like(likes[n], 10 * other + n).tolist()
    board = boards.made_board(_world())
    assert board is not None
    return int(board.shared.words[board.words(other, rank)[1]])


def test_letters() -> None:
    assert run_on_ranks(letters, 2) == [3 * boards.NUM_LETTERS] * 2


def a_rush(rank: int, size: int) -> None:
    """The slots fill and empty again and again: no letter is lost, doubled or overwritten."""
    collectives.all_reduce(torch.ones(1), _world())
    for number in range(400):
        if rank == 0:
            collectives.Posted(torch.full((1000,), float(number)), _world(), to=1)
            time.sleep(0.001 if number % 7 == 0 else 0)
        else:
            time.sleep(0.002 if number % 11 == 0 else 0)
            found = collectives.Arriving(torch.empty(1000), _world(), source=0).wait()
            assert torch.equal(found, torch.full((1000,), float(number)))


def test_letters_in_a_rush() -> None:
    run_on_ranks(a_rush, 2)


def fails(rank: int, size: int) -> None:
    collectives.all_reduce(torch.ones(1), _world())
    if rank == 1:
        raise ValueError("on purpose")
    collectives.all_reduce(torch.ones(1), _world())


def test_a_rank_that_fails_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="on purpose") as caught:
        run_on_ranks(fails, 2, timeout=30)
    assert time.monotonic() - began < 20
    assert "RankGoneError: rank 1" in str(caught.value.__notes__)


def test_a_rank_that_is_killed_is_not_waited_for() -> None:
    memory = mmap.mmap(-1, shared_memory.num_bytes(2, 2, 64))
    with subprocess.Popen(["sleep", "60"]) as other:
        shared = SharedMemory(memory, 2, [os.getpid(), other.pid], rank=0)
        with pytest.raises(TimeoutError, match="rank 1"):
            shared.wait(1, 1, rank=1, patience=0.3)
        other.kill()  # and nobody asks for its exit code
        with pytest.raises(RankGoneError, match="rank 1"):
            shared.wait(1, 1, rank=1)


def patience(rank: int, size: int) -> None:
    board = boards.board_of(_world(), CPU)
    assert board is not None
    if rank == 0:
        with pytest.raises(TimeoutError, match="rank 1"):
            board.publish([]).wait(0.2)
    else:
        time.sleep(0.5)
        board.publish([]).wait()


def test_patience_ends() -> None:
    run_on_ranks(patience, 2)
