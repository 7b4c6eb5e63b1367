"""The watchdog: a rank that hangs ends in an error with the stack of every process, and the ranks are ended."""

from __future__ import annotations

import os
import time

import pytest

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from tests.contract.support import folder
from tests.watchdog import HungError, within

PLUGINS = ("tests.contract.rank_setup", "tests.contract.faults")
HANGS = 112  # the height at which rank 1 hangs, in tests/contract/faults.py


def _parts(error: HungError) -> list[str]:
    """The client's stacks, then those of each rank, without the pool of ranks that other tests have left idle."""
    return [text for text in str(error).split("==== ")[1:] if "tests/ranks.py" not in text]


def test_a_rank_that_hangs_is_shown_with_all_others() -> None:
    pids: list[int] = []

    def hang() -> None:
        parallel = DiffusionParallelConfig(cfg_parallel_size=2)
        with Omni(folder("qwen_image"), parallel_config=parallel, num_threads=1, plugins=PLUGINS) as omni:
            pids.extend(omni.rank_pids)
            omni.generate(["a cat"], OmniDiffusionSamplingParams(height=HANGS, width=64), use_tqdm=False)

    with pytest.raises(HungError) as caught:
        within(20, hang)
    client, *ranks = _parts(caught.value)
    assert "test_watchdog.py" in client
    assert len(ranks) == 2
    hanging = [text for text in ranks if "faults.py" in text and "_hang" in text]
    assert len(hanging) == 1
    assert all("engine.py" in text and "tick" in text for text in ranks)
    _await_end(pids)


def test_a_hang_at_start_is_shown() -> None:
    def hang() -> None:
        Omni(folder("qwen_image"), parallel_config=DiffusionParallelConfig(cfg_parallel_size=2), plugins=plugins)

    plugins = ("tests.contract.rank_setup", "tests.contract.hangs_at_import")
    with pytest.raises(HungError) as caught:
        within(8, hang)
    client, *ranks = _parts(caught.value)
    assert "crew.py" in client
    assert ranks
    assert all("hangs_at_import.py" in text for text in ranks)


def test_what_ends_in_time_is_passed_on() -> None:
    assert within(5, pow, 2, 3) == 8
    with pytest.raises(ZeroDivisionError):
        within(5, divmod, 1, 0)


def _await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    assert pids
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "ranks are left"
        time.sleep(0.1)
