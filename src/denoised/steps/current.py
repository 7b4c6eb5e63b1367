"""Which task this thread runs, so that code far below the engine can tell that it is inside it.

A task has a thread of its own. The engine calls `set_current_task(task)` as the first thing in that thread and
`set_current_task(None)` as the last; code on the way down asks `inside_engine()`. Each thread sees only its own task:
a thread that the engine did not start is outside, whatever other threads do. This file does not know what a task is.
"""

import threading
from typing import Any

_here = threading.local()


def set_current_task(task: Any) -> None:
    """Name the task that this thread runs from now on; None when it ends.

    Tasks do not nest: another task must have ended, with None, before the next is set.
    """
    assert task is None or current_task() is None, "a task is already running in this thread: tasks do not nest"
    _here.task = task


def current_task() -> Any:
    """The task that this thread runs; None outside the engine."""
    return getattr(_here, "task", None)


def inside_engine() -> bool:
    """Whether this thread runs a task: a denoiser call then returns a deferred prediction, and the engine deals it."""
    return current_task() is not None
