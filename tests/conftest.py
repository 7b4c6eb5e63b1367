"""Options of the whole suite, and one thread for torch in every process of it: sums over several round otherwise."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", default=None, help="write the support table of the contract tests to this file")
