"""The process that ranks are forked from: it imports torch and diffusers once, so that starting ranks, or starting
them again after one died, takes a fraction of a second.

It runs nothing itself: no tensor is made here, so that the forked ranks find no thread pool that was cut in half. The
user's main module is never imported: scripts need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Client

from denoised.runtime.protocol import PickleChannel

KEY_VARIABLE = "DENOISED_HOST_KEY"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork a rank for every RankSpec that the client sends; end, and with it all ranks, when the client is gone."""
    key = bytes.fromhex(os.environ.pop(KEY_VARIABLE))
    address = sys.argv[1]
    connection = PickleChannel(Client(address, authkey=key))
    _import_heavy()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended ranks leave no zombies
    while True:
        try:
            spec = connection.recv()
            pid = os.fork()
            if pid == 0:
                _be_rank(spec, connection, address, key)
            connection.send(pid)
        except (EOFError, OSError):
            os._exit(0)  # the client is gone


def _import_heavy() -> None:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler  # noqa: F401

    import denoised.runtime.worker  # noqa: F401


def _be_rank(spec: object, host: PickleChannel, address: str, key: bytes) -> None:
    code = 1
    try:
        host.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _die_with_parent()
        from denoised.runtime.worker import run_rank

        channel = PickleChannel(Client(address, authkey=key))
        channel.send((spec.rendezvous, spec.rank))  # type: ignore[attr-defined]
        run_rank(spec, channel)  # type: ignore[arg-type]
        code = 0
    except (EOFError, OSError):
        pass  # the client went before this rank could call it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
