"""What the client knows of time: when requests came, when they will be done, and whether ranks are still there.

Every method is called on the client's thread, with the time as an argument; nothing here has a clock of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from denoised.config import EngineConfig
from denoised.outputs import OmniRequestOutput, Progress
from denoised.request import Request
from denoised.runtime import cost
from denoised.runtime.counting import ClientMeter, ReplicaMeter
from denoised.runtime.forecast import Job, Times, forecast, job_of
from denoised.runtime.intake import Intake
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.protocol import Ticked
from denoised.runtime.room import Need
from denoised.runtime.scheduler import Entry, Scheduler
from denoised.runtime.stats import ReplicaStats, Stats

# Forecasts are made anew after so many seconds, or so many times as long as one takes; or when requests come or go.
STALE, REST = 1.0, 20.0
# A queued request is told of its place when it changes, and of its end when that moves by this share.
NEWS = 0.2
# A tick may take this many times what is predicted; what was never measured, so many times `hang_timeout`.
SLACK, SLACK_OF_THE_UNKNOWN = 20.0, 10.0


@dataclasses.dataclass(kw_only=True)
class Note:
    """What is kept of a request without an output. Times are the client's; None: not yet.

    guess: when half of its steps were done, and what a forecast then said was left; stretch: what that was told with.
    told: place and end as they were last told while it waited.
    """

    came: float
    cost: cost.Cost
    stopped: float | None = None
    guess: tuple[float, float] | None = None
    stretch: float = 1.0
    told: tuple[int, float] | None = None


@dataclasses.dataclass(kw_only=True)
class Pulse:
    """A replica's signs of life: the last one, and what its next tick is expected to take."""

    last: float = 0.0
    expected: float | None = 0.0


class Desk:
    """Times, places and counts of the requests of one client."""

    def __init__(self, scheduler: Scheduler, config: EngineConfig, info: ModelInfo, *, size: int) -> None:
        self._scheduler, self._info, self._size = scheduler, info, size
        self._hang_timeout = config.hang_timeout
        num_replicas = len(scheduler.lanes)
        self.intake = Intake(config.max_queue_len, config.max_queue_seconds, size * num_replicas)
        self.times, self.meter = Times(), ClientMeter()
        self._replicas = [ReplicaMeter() for _ in range(num_replicas)]
        self._pulses = [Pulse() for _ in range(num_replicas)]
        self._notes: dict[str, Note] = {}
        self._ends: dict[str, float] = {}
        self._made, self._took, self._news = -math.inf, 0.0, False

    # ---- requests come and go

    def predict(self, request: Request) -> float:
        """Seconds that a request will probably take by itself. On any thread."""
        return self.times.total(cost.predict(request, self._info))

    def came(self, request: Request, now: float) -> None:
        """Queue it."""
        note = Note(came=now, cost=cost.predict(request, self._info))
        self._notes[request.request_id] = note
        self.meter.submitted += 1
        self._news = True
        self._scheduler.add(
            request.request_id,
            note.cost,
            service=request.service,
            seconds=self.times.total(note.cost),
            need=self._need(request),
            now=now,
        )

    def _need(self, request: Request) -> Need:
        if self._info.footprint is None:
            return Need()
        need: Need = self._info.footprint.need(cost.shape_of(request.prompt, request.params, self._info))
        return need

    def started(self, request_id: str, now: float) -> None:
        """It was handed to its replica."""
        self.intake.start(request_id)
        self.meter.add("admission_wait", now - self._notes[request_id].came)
        replica = self._scheduler.replica_of(request_id)
        assert replica is not None, "only what runs has a replica"
        if len(self._scheduler.lanes[replica]) == 1:
            self._pulses[replica].last = now
        self._news = True

    def stopped(self, request_id: str, since: float) -> None:
        """It is to end before its time; `since`: when that was asked for."""
        if request_id in self._notes and self._notes[request_id].stopped is None:
            self._notes[request_id].stopped = since

    def ended(self, output: OmniRequestOutput, now: float) -> None:
        """It has its output."""
        self.intake.leave(output.request_id)
        note = self._notes.pop(output.request_id, None)
        if note is None:
            return
        self._news = True
        self.meter.ended(output, now - note.came)
        if note.stopped is not None:
            self.meter.add("time_to_free", now - note.stopped)
        if output.error is None:
            self._learn(note, output, now)

    def _learn(self, note: Note, output: OmniRequestOutput, now: float) -> None:
        stages = output.stage_durations
        if output.receipt is not None and not output.receipt.resumed_from_step:
            self.times.learn_ends(note.cost.per_step, stages.get("encode", 0.0), stages.get("decode", 0.0))
        if note.guess is not None and now > note.guess[0]:
            at, left = note.guess
            self.meter.add("eta_error", abs(left * note.stretch - (now - at)) / (now - at))
            self.times.learn_stretch(left, now - at)

    def refused(self, kind: str) -> None:
        """A request that never came in."""
        self.meter.errors[kind] += 1

    # ---- what ranks say

    def heard(self, replica: int, now: float) -> None:
        """Any word of a replica is a sign of life."""
        self._pulses[replica].last = now

    def ticked(self, replica: int, word: Ticked) -> None:
        self._pulses[replica].expected = word.expected
        self._replicas[replica].heard(word)
        for request_id, step in word.costs.items():
            if (note := self._notes.get(request_id)) is not None:
                self.times.learn_step(note.cost.per_step, step)

    def restarted(self, replica: int, now: float) -> None:
        """Its ranks are gone, and others take their place."""
        self._replicas[replica].restarted()
        self._pulses[replica] = Pulse(last=now)

    def progress(self, event: Progress, now: float) -> Progress:
        """The event with the time that is left."""
        self._scheduler.progress(event.request_id, event.step, event.total_steps)
        self._refresh(now)
        left = self._left(event.request_id, now)
        note = self._notes.get(event.request_id)
        if note is not None and left is not None and note.guess is None and 2 * event.step >= event.total_steps:
            note.guess, note.stretch = (now, left / self.times.stretch), self.times.stretch
        return dataclasses.replace(event, position=0, eta_seconds=left)

    def forgive(self, now: float) -> None:
        """Nobody listened for a while: silence counts from now on."""
        for pulse in self._pulses:
            pulse.last = max(pulse.last, now)

    def hung(self, now: float) -> list[tuple[int, float]]:
        """Replicas that say nothing for longer than their tick can take, and for how long."""
        return [
            (replica, now - pulse.last)
            for replica, pulse in enumerate(self._pulses)
            if replica in self._scheduler.busy_replicas and now - pulse.last > self._patience(pulse)
        ]

    def _patience(self, pulse: Pulse) -> float:
        if pulse.expected is None:
            return SLACK_OF_THE_UNKNOWN * self._hang_timeout
        return max(self._hang_timeout, SLACK * pulse.expected)

    # ---- what is to come

    def places(self, now: float) -> list[Progress]:
        """Queued requests that are to be told of their place."""
        queue = self._scheduler.queue()
        if not queue:
            return []
        self._refresh(now)
        events = []
        for position, entry in enumerate(queue, start=1):
            left = self._left(entry.request_id, now)
            note = self._notes[entry.request_id]
            if _is_news(note.told, position, left):
                note.told = (position, math.inf if left is None else left)
                total = int(entry.cost.steps)
                events.append(
                    Progress(
                        request_id=entry.request_id, step=0, total_steps=total, position=position, eta_seconds=left
                    )
                )
        return events

    def _left(self, request_id: str, now: float) -> float | None:
        end = self._ends.get(request_id)
        return None if end is None or not self.times.measured else max(0.0, end - now)

    def _refresh(self, now: float) -> None:
        """A new forecast, if something changed or the last one is old, and if it does not cost too much."""
        age = now - self._made
        if age < STALE and not (self._news and age >= REST * self._took):
            return
        waiting = self._scheduler.queue()
        lanes = [[self._job(entry) for entry in lane] for lane in self._scheduler.lanes]
        ends, starts = forecast(lanes, [self._job(entry) for entry in waiting], self._size)
        self._ends = {request_id: now + left * self.times.stretch for request_id, left in ends.items()}
        self.intake.next_start = self.times.stretch * min((starts or ends).values(), default=0.0)
        self._made, self._news = now, False

    def took(self, seconds: float) -> None:
        """What looking took: forecasts are made no more often than that allows."""
        self._took = seconds

    def _job(self, entry: Entry) -> Job:
        service = entry.service
        return job_of(
            entry.request_id,
            entry.cost,
            self.times,
            steps_left=entry.steps_left,
            begun=entry.begun,
            priority=service.priority,
            tenant=service.tenant,
            weight=service.weight,
        )

    # ---- counts

    def stats(self, ready: Sequence[int]) -> Stats:
        """A snapshot; `ready`: replicas whose ranks are there."""
        lanes = self._scheduler.lanes
        replicas = tuple(
            ReplicaStats(
                replica=number,
                ready=number in ready,
                running=len(lane),
                seconds_left=sum(job.left_alone for job in map(self._job, lane)),
                restarts_total=meter.restarts,
                memory_mb=meter.memory_mb,
                loras=meter.loras,
                lora_mb=meter.lora_mb,
                work=meter.work,
            )
            for number, (lane, meter) in enumerate(zip(lanes, self._replicas, strict=True))
        )
        return Stats(
            queued=self._scheduler.num_waiting,
            running=len(self._scheduler.running),
            queued_seconds=self.intake.queued_seconds,
            submitted_total=self.meter.submitted,
            completed_total=self.meter.completed,
            errors_total=dict(self.meter.errors),
            **self.meter.spreads,
            replicas=replicas,
        )


def _is_news(told: tuple[int, float] | None, position: int, left: float | None) -> bool:
    """inf stands for an end that was not known."""
    if told is None or told[0] != position:
        return True
    return left is not None and abs(left - told[1]) > NEWS * max(left, 1.0)
