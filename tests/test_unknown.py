"""The parts of a replay: trees that come back, tensors that are not known, checkpoints within a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from denoised.outputs import Saved
from denoised.runtime.checkpoints import Checkpoint
from denoised.runtime.kept import Kept
from denoised.steps.packing import UnpackableError, pack
from denoised.steps.unknown import NeedsValue, Unknown, known, unknown


def test_a_tree_comes_back_as_it_was() -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    tree: dict[Any, Any] = {
        "a": [1, 2.5, None, True, "x", (float("inf"),)],
        3: torch.arange(3).to(torch.bfloat16),
        "n": np.float64(0.1),
        "m": np.arange(4.0).reshape(2, 2),
        "p": [picture, picture.convert("P")],
        "d": torch.float16,
    }
    back = pack(tree).unpack()
    assert list(back) == list(tree)
    assert back["a"] == tree["a"]
    assert type(back["n"]) is np.float64
    assert torch.equal(back[3], tree[3])
    assert np.array_equal(back["m"], tree["m"])
    assert back["d"] is torch.float16
    assert back["p"][0].tobytes() == picture.tobytes()
    assert back["p"][1].mode == "P"
    with pytest.raises(UnpackableError):
        pack([object()])


@pytest.fixture
def half() -> torch.Tensor:
    """[2, 4], of which the first row is known."""
    return torch.cat([torch.ones(1, 4), unknown((1, 4), torch.float32, "cpu")])


def test_what_does_not_depend_on_the_unknown_is_known(half: torch.Tensor) -> None:
    value = (half * 2 - 1).unsqueeze(0).flatten(0, 1)[:1]
    assert isinstance(value, Unknown)
    assert type(known(value)) is torch.Tensor
    assert torch.equal(known(value), torch.ones(1, 4))
    assert torch.equal(known(torch.zeros_like(half)), torch.zeros(2, 4))
    buffer = torch.zeros(2, 4)
    buffer[:] = half  # from now on it is open, too
    with pytest.raises(NeedsValue):
        known(buffer)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.sign(x),  # would hide it
        lambda x: torch.nan_to_num(x),
        lambda x: x.argmax(),
        lambda x: x.to(torch.int64),
        lambda x: torch.where(x > 0, 1.0, 2.0),
        lambda x: known([{"a": x + 1}]),
    ],
)
def test_whoever_looks_at_the_unknown_is_stopped(half: torch.Tensor, look: Any) -> None:
    with pytest.raises(NeedsValue):
        look(half)


def test_kept_checkpoints_are_bounded() -> None:
    def saved(request_id: str, size: int) -> Saved:
        return Saved(request_id=request_id, step=1, checkpoint=Checkpoint(meta={}, tensors=[torch.zeros(size)]))

    kept = Kept(max_bytes=100)
    kept.keep(saved("a", 10))
    kept.keep(saved("a", 20))
    kept.keep(saved("b", 10))
    assert kept.num_bytes == 80, "one of each request, and none past the bound"
    kept.drop("a")
    assert kept.num_bytes == 0
