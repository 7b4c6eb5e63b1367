"""The client against ranks that are made of paper: whatever they do and whenever they do it, every request ends."""

from __future__ import annotations

import dataclasses
import gc
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from denoised import Omni
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import EngineError, InvalidRequestError, ModelError
from denoised.outputs import OmniRequestOutput, Progress
from denoised.request import OmniDiffusionSamplingParams, Request
from denoised.runtime import launch, omni, program
from denoised.runtime.client import Client
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Command, Failed, Ready
from tests.contract.support import folder

INFO = ModelInfo(
    model="m",
    pipeline="P",
    kind="image",
    parameters=frozenset({"self"}),
    size_multiple=8,
    frame_multiple=1,
    branching_config=frozenset(),
    device="cpu",
    dtype="float32",
)


class PaperRanks:
    """Ranks that say what a script says: `start` when they start, `obey` for each command."""

    def __init__(self, script: Script, deliver: Callable[[int, Any], None]) -> None:
        self.script, self.deliver, self.killed, self.pids = script, deliver, False, [1, 2]
        script.started.append(self)
        script.start(self)

    def ready(self) -> None:
        for rank in range(2):
            self.deliver(rank, Ready(info=INFO, seconds=0.0))

    def send(self, command: Command) -> None:
        self.script.commands.append(command)
        self.script.obey(self, command)

    def kill(self) -> None:
        self.killed = True

    def join(self, timeout: float) -> None:
        pass


class Script:
    def __init__(self) -> None:
        self.started: list[PaperRanks] = []
        self.commands: list[Command] = []
        self.start: Callable[[PaperRanks], None] = lambda ranks: ranks.ready()
        self.obey: Callable[[PaperRanks, Command], None] = answer


def answer(ranks: PaperRanks, command: Command) -> None:
    if command.admit is not None:
        ranks.deliver(0, OmniRequestOutput(request_id=command.admit.request_id, prompt={}))


def silent(ranks: PaperRanks, command: Command) -> None:
    if command.cancel is not None:
        ranks.deliver(0, OmniRequestOutput(request_id=command.cancel, prompt={}, error="aborted"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()

    class Host:
        def fork(self, config: EngineConfig, deliver: Any, **place: int) -> PaperRanks:
            return PaperRanks(made, deliver)

    monkeypatch.setattr(launch, "shared_host", Host)
    return made


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    made = start()
    yield made
    made.close()
    assert not made._thread.is_alive()


def start(**settings: Any) -> Client:
    parallel = DiffusionParallelConfig(cfg_parallel_size=2)
    return Client(EngineConfig(model=folder("qwen_image"), parallel_config=parallel, **settings))


class Inbox:
    """A listener that waits."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, event: Progress | OmniRequestOutput) -> None:
        self.events.put(event)

    def output(self) -> OmniRequestOutput:
        while True:
            event = self.events.get(timeout=10)
            if isinstance(event, OmniRequestOutput):
                return event


def ask(client: Client, request_id: str = "a", listener: Any = None, **prompt: Any) -> Inbox:
    inbox = Inbox()
    params = OmniDiffusionSamplingParams()
    client.submit(Request(request_id=request_id, prompt=prompt, params=params, seed=0), listener or inbox)  # type: ignore[arg-type]
    return inbox


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_listener_that_raises_harms_nobody_else(client: Client) -> None:
    def broken(event: Any) -> None:
        raise RuntimeError("Event loop is closed")

    ask(client, "a", broken)
    assert ask(client, "b").output().error is None


def test_listener_may_close_the_engine(script: Script) -> None:
    client = start()
    ask(client, "a", lambda event: client.close())
    client._thread.join(timeout=10)
    assert not client._thread.is_alive()
    assert script.started[-1].killed
    assert "closed" in (ask(client, "b").output().error or "")


def test_request_id_in_use_is_refused_and_the_first_one_ends_well(client: Client, script: Script) -> None:
    script.obey = silent
    first, second = ask(client, "same"), ask(client, "same")
    assert "request_id='same' is in use" in (second.output().error or "")
    client.abort("same")
    assert first.output().error == "aborted"


def test_request_that_cannot_be_sent_fails_alone(client: Client, script: Script) -> None:
    def obey(ranks: PaperRanks, command: Command) -> None:
        if command.admit is not None and command.admit.request_id == "bad":
            raise OSError("image file is truncated")
        answer(ranks, command)

    script.obey = obey
    assert "image file is truncated" in (ask(client, "bad").output().error or "")
    assert ask(client, "good").output().error is None


def test_what_cannot_be_packed_is_an_error_of_the_send() -> None:
    """And not taken for a rank that is gone."""

    class Torn:
        def __reduce__(self) -> Any:
            raise OSError("image file is truncated")

    ranks = launch.ForkedRanks(pids=[], channels={}, deliver=lambda rank, event: None)
    request = Request(request_id="a", prompt={"prompt": Torn()}, params=OmniDiffusionSamplingParams(), seed=0)  # type: ignore[typeddict-item]
    with pytest.raises(OSError, match="truncated"):
        ranks.send(Command(admit=request))


def test_aborts_of_running_waiting_finished_and_unknown_requests(script: Script) -> None:
    script.obey = silent
    client = start(max_num_seqs=1)
    running, waiting = ask(client, "running"), ask(client, "waiting")
    client.abort("unknown")
    client.abort("waiting")
    assert waiting.output().error == "aborted"
    client.abort("running")
    assert running.output().error == "aborted"
    client.abort("running")
    script.obey = answer
    assert ask(client, "next").output().error is None
    assert [c.cancel for c in script.commands if c.cancel] == ["running"]
    client.close()


def test_aborted_request_is_not_run_again_after_a_crash(client: Client, script: Script) -> None:
    script.obey = lambda ranks, command: None
    aborted, other = ask(client, "aborted"), ask(client, "other")
    client.abort("aborted")
    until(lambda: any(c.cancel for c in script.commands))
    script.commands.clear()
    script.obey = answer
    script.started[-1].deliver(1, None)
    assert other.output().error is None
    assert aborted.output().error == "aborted"
    assert [c.admit.request_id for c in script.commands if c.admit] == ["other"]


def test_events_of_ranks_that_are_gone_are_history(client: Client, script: Script) -> None:
    script.obey = lambda ranks, command: None
    inbox = ask(client)
    until(lambda: script.commands)
    script.started[0].deliver(1, None)
    until(lambda: len(script.started) == 2 and len(script.commands) == 2)
    script.started[0].deliver(0, OmniRequestOutput(request_id="a", prompt={}, error="stale"))
    script.started[0].deliver(0, None)
    script.started[1].deliver(0, OmniRequestOutput(request_id="a", prompt={}))
    assert inbox.output().error is None
    assert client.restarts == 1


def test_close_with_requests_in_flight_and_waiting(script: Script) -> None:
    script.obey = lambda ranks, command: None
    client = start(max_num_seqs=1)
    inboxes = [ask(client, str(i)) for i in range(3)]
    client.close()
    assert all("closed before" in (inbox.output().error or "") for inbox in inboxes)
    assert script.started[-1].killed


def test_close_while_ranks_start_again(script: Script) -> None:
    """The ranks would take for ever: close does not wait for them, and starts no others."""
    script.obey = lambda ranks, command: None
    client = start()
    inbox = ask(client)
    script.start = lambda ranks: None
    script.started[0].deliver(0, None)
    until(lambda: len(script.started) == 2)
    late = ask(client, "late")
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 5
    assert inbox.output().error
    assert late.output().error
    assert len(script.started) == 2
    assert all(ranks.killed for ranks in script.started)


def test_what_is_asked_during_a_restart_keeps_its_order(client: Client, script: Script) -> None:
    """Asked before the ranks are ready, aborted after: both wait in the inbox when the restart begins."""
    inboxes: list[Inbox] = []

    def start(ranks: PaperRanks) -> None:
        inboxes.append(ask(client, "a"))
        ranks.ready()
        client.abort("a")

    script.start, script.obey = start, silent
    script.started[0].deliver(0, None)
    until(lambda: inboxes)
    assert inboxes[0].output().error == "aborted"


def test_submit_races_with_close(script: Script) -> None:
    """However they meet, each request has an output."""
    for _ in range(20):
        client, inboxes = start(), []
        threads = [threading.Thread(target=lambda c=client, i=inboxes: i.append(ask(c, "a")))]
        threads += [threading.Thread(target=client.close)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
        assert inboxes[0].output() is not None


def test_ranks_that_die_while_they_start(script: Script) -> None:
    script.start = lambda ranks: ranks.deliver(1, None)
    with pytest.raises(EngineError, match="rank 1 died while it started"):
        start()
    assert len(script.started) == 3
    assert all(ranks.killed for ranks in script.started)


def test_settings_that_a_rank_refuses_are_not_tried_again(script: Script) -> None:
    script.start = lambda ranks: ranks.deliver(1, Failed(error="no such model.", by_user=True))
    with pytest.raises(ModelError, match="no such model"):
        start()
    assert len(script.started) == 1
    assert script.started[0].killed


def test_launch_that_fails_once_is_tried_again(script: Script) -> None:
    def start_once(ranks: PaperRanks) -> None:
        if len(script.started) == 1:
            raise EOFError
        ranks.ready()

    script.start = start_once
    client = start()
    assert len(script.started) == 2
    client.close()


def test_engine_that_cannot_start_again_fails_every_request(client: Client, script: Script) -> None:
    script.obey = lambda ranks, command: None
    inbox = ask(client)
    script.start = lambda ranks: ranks.deliver(0, None)
    script.started[0].deliver(0, None)
    assert "cannot run any more" in (inbox.output().error or "")
    assert "cannot run any more" in (ask(client, "b").output().error or "")


def test_under_torchrun_an_output_may_come_before_its_request(client: Client, script: Script) -> None:
    """Rank 0's program is ahead: this rank's engine is done before this rank's program has asked."""
    client._replicas.torchrun = client._replicas.crews[0].torchrun = 1
    script.started[0].deliver(1, OmniRequestOutput(request_id="early", prompt={}))
    until(lambda: client._inbox.empty())
    assert ask(client, "early").output().error is None
    assert not script.commands, "only rank 0 sends"


def test_generator_left_early_aborts_what_runs(script: Script) -> None:
    script.obey = silent
    parallel = DiffusionParallelConfig(cfg_parallel_size=2)
    with Omni(folder("qwen_image"), parallel_config=parallel) as engine:

        def first_ends(ranks: PaperRanks, command: Command) -> None:
            if command.admit is not None and command.admit.request_id == "req-0":
                answer(ranks, command)

        script.obey = first_ends
        outputs = engine.generate([{}, {}, {}], use_tqdm=False, py_generator=True)
        next(outputs)
        outputs.close()
        until(lambda: {c.cancel for c in script.commands if c.cancel} == {"req-1", "req-2"})
        script.commands.clear()
        engine.generate([{}, {}], use_tqdm=False, py_generator=True).close()  # never started
        time.sleep(0.1)
        assert not [c for c in script.commands if c.admit]


def test_interrupt_while_waiting_aborts(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.obey = silent
    parallel = DiffusionParallelConfig(cfg_parallel_size=2)

    class Interrupted(queue.SimpleQueue):  # type: ignore[type-arg]
        def get(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with Omni(folder("qwen_image"), parallel_config=parallel) as engine:
        monkeypatch.setattr(omni.queue, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([{}, {}], use_tqdm=False)
        monkeypatch.undo()
        until(lambda: {c.cancel for c in script.commands if c.cancel} == {"req-0", "req-1"})


def test_engine_that_is_dropped_ends(script: Script) -> None:
    engine = Omni(folder("qwen_image"), parallel_config=DiffusionParallelConfig(cfg_parallel_size=2))
    thread, gone = engine._client._thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert script.started[-1].killed


def test_seed_is_drawn_before_a_request_is_queued(script: Script) -> None:
    """So that it gives the same picture when it is run again after a crash, and others give others."""
    script.obey = lambda ranks, command: None
    with Omni(folder("qwen_image"), parallel_config=DiffusionParallelConfig(cfg_parallel_size=2)) as engine:
        for request_id in "ab":
            engine._client.submit(engine._request(request_id, {}, None), Inbox())
        until(lambda: len(script.commands) == 2)
        script.started[0].deliver(0, None)
        until(lambda: len(script.commands) == 4)
        seeds = [c.admit.seed for c in script.commands if c.admit]
        assert seeds[:2] == seeds[2:]
        assert seeds[0] != seeds[1]


def test_generator_travels_by_its_state(script: Script) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)
    with Omni(folder("qwen_image"), parallel_config=DiffusionParallelConfig(cfg_parallel_size=2)) as engine:
        engine._client.info = dataclasses.replace(INFO, parameters=frozenset({"generator"}))
        request = engine._request("a", {}, OmniDiffusionSamplingParams(generator=generator))
        assert request.params.generator is None
        drawn = [torch.randn(3, generator=program._randomness(request, engine.info, "cpu")["generator"]) for _ in "ab"]
        assert torch.equal(drawn[0], drawn[1]), "each run starts from the state that it was given with"
        assert torch.equal(drawn[0], torch.randn(3, generator=generator)), "which was not advanced"
        with pytest.raises(InvalidRequestError, match="generator=3"):
            engine._request("b", {}, OmniDiffusionSamplingParams(generator=3))


LEFT_OPEN = """
import sys
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

parallel = DiffusionParallelConfig(cfg_parallel_size=int(sys.argv[2]))
omni = Omni(sys.argv[1], parallel_config=parallel, num_threads=1)
params = OmniDiffusionSamplingParams(num_inference_steps=10_000, height=64, width=64)
omni._client.submit(omni._request("a", "a cat", params), lambda event: None)
print("last line")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_interpreter_ends_with_an_engine_that_nobody_closed(ranks: int) -> None:
    """In the middle of a request: at once, with code 0, without a word."""
    command = [sys.executable, "-c", LEFT_OPEN, folder("qwen_image"), str(ranks)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "last line\n"
    assert result.stderr == ""


def test_rank_that_dies_before_it_is_connected() -> None:
    """Nobody waits for a call that will not come."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = object.__new__(launch.Host)
    host._accepted = queue.SimpleQueue()
    with subprocess.Popen(["sleep", "60"]) as alive:
        host._process = alive
        with pytest.raises(EngineError, match="rank 1 died before it was connected"):
            host._accept([alive.pid, ended.pid])
        alive.kill()
    with pytest.raises(EngineError, match="ended with code"):
        host._accept([])
