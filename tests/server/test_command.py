"""`denoised serve` as a process: its one line, its signals, its refusals, and a rank that is killed under it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.cli import denoised

STEPS = '{"num_inference_steps": 4}'


class Process:
    """A server in a process of its own, and the line that it said."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "denoised.cli", "serve", "--port", "0", "--num-threads", "1", *arguments]
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self.popen.stdout is not None
        self.line = self.popen.stdout.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+), ", self.line)
        assert found, (self.line, self.popen.stderr.read() if self.popen.stderr and not self.line else "")
        self.url = found[1]

    def ask(self, steps: int) -> tuple[threading.Thread, list[Any]]:
        """Send a request on a thread; its answer is put into the list."""
        answers: list[Any] = []

        def main() -> None:
            body = {"prompt": "a red circle", "num_inference_steps": steps, "seed": 3}
            try:
                answers.append(httpx2.post(f"{self.url}/v1/images/generations", json=body, timeout=120))
            except httpx2.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=main)
        thread.start()
        deadline = time.monotonic() + 60
        while "denoised_running 1.0" not in httpx2.get(f"{self.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return thread, answers

    def end(self, number: int, seconds: float) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(timeout=seconds)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for process in made:
        process.popen.kill()
        process.popen.communicate()


def test_rank_that_dies_is_told_and_mended_and_sigterm_drains(processes: list[Process]) -> None:
    """The request in flight is run again and gives what it would have given; then the server ends in good order."""
    server = Process("shapes", "--cfg-parallel-size", "2", "--default-sampling-params", STEPS)
    processes.append(server)
    assert re.fullmatch(
        r"denoised serves shapes \(QwenImagePipeline\) at http://\S+, 2 ranks on cpu, ready after [\d.]+ s\n",
        server.line,
    )
    assert httpx2.get(f"{server.url}/health").status_code == 200
    body = {"prompt": "a red circle", "num_inference_steps": 30, "seed": 3}
    undisturbed = httpx2.post(f"{server.url}/v1/images/generations", json=body, timeout=120).json()["data"]
    thread, answers = server.ask(30)
    ranks = [child for child in psutil.Process(server.popen.pid).children(recursive=True) if not child.children()]
    ranks[-1].kill()
    down: list[Any] = []
    while (answer := httpx2.get(f"{server.url}/health")).status_code == 503 or not down:
        down += [answer.json()] if answer.status_code == 503 else []
        time.sleep(0.01)
    assert down[0]["status"] == "degraded"
    assert "ranks are down" in down[0]["reason"]
    thread.join()
    assert answers[0].json()["data"] == undisturbed
    assert answers[0].json()["receipt"]["restarts"] == 1

    thread, answers = server.ask(30)
    server.popen.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    late = httpx2.post(f"{server.url}/v1/images/generations", json=body)
    assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
    assert httpx2.get(f"{server.url}/health").json()["status"] == "draining"
    assert httpx2.get(f"{server.url}/v1/models").status_code == 200
    thread.join()
    assert answers[0].json()["data"] == undisturbed
    children = psutil.Process(server.popen.pid).children(recursive=True)
    assert server.popen.wait(timeout=60) == 0
    assert server.popen.stderr is not None
    assert server.popen.stderr.read() == ""
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]


def test_drain_has_an_end_and_a_second_signal_is_at_once(processes: list[Process]) -> None:
    server = Process("shapes", "--drain-timeout", "1", DENOISED_API_KEY="one,two")
    processes.append(server)
    assert httpx2.get(f"{server.url}/v1/models").status_code == 401
    assert httpx2.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
    assert server.end(signal.SIGTERM, 60) == 0
    other = Process("shapes", "--skip-warm-up")
    processes.append(other)
    thread, _ = other.ask(9000)
    other.popen.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert other.popen.poll() is None
    assert other.end(signal.SIGTERM, 5) == 128 + signal.SIGTERM
    thread.join()


def refused(*arguments: str) -> str:
    result = denoised("serve", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen there" in refused("--port", str(taken.getsockname()[1]))
    assert "port=70000" in refused("--port", "70000")
    assert "given as an argument and as --model" in refused("shapes", "--model", "shapes")
    assert "api_key=''" in refused("--api-key", "")
    assert "64 hexadecimal digits" in refused("--api-key", "sha256:12")
    assert str(tmp_path) in refused(str(tmp_path), "--port", "0")
    assert "No such option: --prot" in refused("--prot", "1")
