"""The caches there are: every file here with a `NAME` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def kinds() -> dict[str, Any]:
    """Name to module of each cache (`policy.Kind`)."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}
