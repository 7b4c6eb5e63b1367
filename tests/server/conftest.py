"""One server of the built-in model for all tests here: it starts once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import KEY, OTHER_KEY, Live, live

STEPS = 4


@pytest.fixture(scope="session")
def shapes() -> Iterator[Live]:
    """Keys of two tenants, a short queue, few steps, small limits."""
    with live(
        key=KEY,
        api_key=(KEY, OTHER_KEY),
        cors_origin=("https://ok.example",),
        max_body_mb=1,
        max_n=4,
        drain_timeout=0,
        max_num_seqs=2,
        max_queue_len=2,
        max_pixels=256 * 256,
        default_sampling_params={"num_inference_steps": STEPS},
    ) as made:
        yield made
