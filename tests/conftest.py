"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", default=None, help="write the support table of the contract tests to this file")
