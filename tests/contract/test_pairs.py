"""Every two parallel methods at once, and each of them on four ranks.

A pair is green, with each method's trace on every rank, or refused with its reason. One model a pair; `--full` takes
all that have the method.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from denoised import OmniRequestOutput
from denoised.errors import InvalidConfigError
from tests.contract.parallel import METHODS, SMALL_TILES, acted, check, dealt, degrees_of, run, run_requests, tiled
from tests.contract.support import REORDERED, difference, media, request_of, rows_counted, rows_of
from tests.tiny.row import Request

# Double stream, single stream, cross-attention video with two experts, guidance in one batch.
REPRESENTATIVE = ("qwen_image", "flux_true_cfg", "wan22_t2v", "sd3")
MIXTURES = ("hidream_i1",)
# The model of each pair with tiles of the VAE that is for every run: one of them has videos.
TILED = {pair: "sd3" for pair in combinations(METHODS, 2) if "vae_patch" in pair and "expert" not in pair}
TILED["cfg", "vae_patch"] = "wan22_t2v"
REFUSED = {("text_encoder_tp", "hsdp"): "text_encoder_tp_size cannot go with use_hsdp=True"}
# Decoded pictures of several tiles.
TILED_SIZES: dict[str, Request] = {
    "qwen_image": {"height": 64, "width": 96},
    "flux_true_cfg": {"height": 64, "width": 96},
    "wan22_t2v": {"height": 64, "width": 64, "num_frames": 5},
    "sd3": {"height": 64, "width": 96},
    "hidream_i1": {"height": 16, "width": 64},
}


def _models(*methods: str) -> tuple[str, ...]:
    return MIXTURES if "expert" in methods else REPRESENTATIVE


def _pairs() -> list[Any]:
    """All pairs by all models; one model of each pair is for every run."""
    cells = []
    for number, pair in enumerate(combinations(METHODS, 2)):
        models = _models(*pair)
        for place, name in enumerate(models):
            usual = name == TILED[pair] if pair in TILED else place == number % len(models)
            cells.append(pytest.param(name, *pair, marks=() if usual else pytest.mark.slow))
    return cells


@pytest.mark.pair("{first}", "{second}")
@pytest.mark.parametrize(("name", "first", "second"), _pairs())
def test_pair(name: str, first: str, second: str, record_property: Callable[[str, object], None]) -> None:
    """Two requests in flight."""
    degrees = degrees_of(first, second)
    if (first, second) in REFUSED or (second, first) in REFUSED:
        reason = REFUSED.get((first, second)) or REFUSED[second, first]
        with pytest.raises(InvalidConfigError, match=reason) as caught:
            run(name, [0, 1], **degrees)
        record_property("refused", str(caught.value))
        return
    _check(name, degrees, (first, second))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if name == _models(method)[-1] else pytest.mark.slow)
        for method in METHODS
        for name in _models(method)
    ],
)
def test_on_four_ranks(name: str, method: str) -> None:
    _check(name, degrees_of(method, size=4), (method,))


def test_three_that_cannot_go_together() -> None:
    with pytest.raises(InvalidConfigError, match="use tensor_parallel_size with it, or leave one out"):
        run("hidream_i1", [0], **degrees_of("expert", "hsdp", "ulysses"))


def _check(name: str, degrees: dict[str, Any], methods: tuple[str, ...]) -> None:
    """The right result, and the traces of all methods on every rank."""
    if "vae_patch" in methods:
        outputs, rows = _decoded(name, degrees)
    else:
        outputs = run(name, [0, 1], **degrees)
        check(name, outputs, [0, 1], [*methods, *_implied(degrees)])
        rows = [rows_of(name, index) for index in (0, 1)]
    acted(outputs, methods)
    dealt(outputs, rows, degrees)


def _implied(degrees: dict[str, Any]) -> list[str]:
    """Methods that were added for others to act over."""
    return ["tensor"] if degrees.get("tensor_parallel_size", 1) > 1 else []


def _decoded(name: str, degrees: dict[str, Any]) -> tuple[list[OmniRequestOutput], list[int]]:
    """The outputs, and the rows that each request has."""
    requests = [request_of(name, i) | TILED_SIZES[name] | {"num_inference_steps": 2} for i in (0, 1)]
    outputs, rows = run_requests(name, requests, output_type="pt", plugins=SMALL_TILES, **degrees), []
    for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        with rows_counted(name) as counted:
            expected = tiled(name, request, index)
        assert difference(expected, media(output)) <= REORDERED
        rows.append(counted.total())
    return outputs, rows
