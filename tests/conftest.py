"""Options of the whole suite, and one thread for torch in every process of it: sums over several round otherwise."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start
# Where ranks write their stacks (tests/watchdog.py).
os.environ["DENOISED_TEST_STACKS"] = tempfile.mkdtemp(prefix="denoised-stacks-")
atexit.register(shutil.rmtree, os.environ["DENOISED_TEST_STACKS"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", default=None, help="write the support table of the contract tests to this file")
    parser.addoption("--full", action="store_true", help="also the tests marked slow: every cell, many random cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests are left out by name, not skipped, unless the full run asks for them."""
    if config.getoption("--full"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in set(slow)]
    config.hook.pytest_deselected(items=slow)
