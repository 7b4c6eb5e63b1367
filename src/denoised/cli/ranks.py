"""The command line under torchrun, which starts it once a rank: rank 0 speaks, saves and serves, the others follow."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from denoised.config import EngineConfig


def leads() -> bool:
    """Whether this process is the one whose words and files count; alone, it is."""
    from denoised.runtime.torchrun import torchrun_rank

    return torchrun_rank() in (None, 0)


def follow(settings: dict[str, Any]) -> None:
    """Lend this process's rank to what rank 0 serves, until that ends. `settings`: the keywords of `Omni`.

    Raises:
        DenoisedError: the model could not be loaded.
    """
    from denoised.runtime.client import Client

    client = Client(EngineConfig(**settings))
    try:
        with _patience():
            client.follow()
    finally:
        client.close()


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """torchrun passes a signal to every rank: the first is rank 0's to act on, which needs this rank while it drains;
    the second ends this process at once."""
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        if heard:
            os._exit(128 + number)
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
