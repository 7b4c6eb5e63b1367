"""Whose turn it is, by simulation with a clock of our own: fairness, its bound, what is joined, and idle ranks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from denoised.request import Service
from denoised.runtime.cost_model import Load
from denoised.runtime.fair import FairClock
from denoised.runtime.turns import Part, Turn, Turns, Wish

IMAGE, VIDEO = "image", "video"
SIZES = {IMAGE: 100, VIDEO: 10_000, "encoder": 1, "vae": 50}


@dataclasses.dataclass(kw_only=True)
class Made:
    """A request of the simulation."""

    name: str
    kind: str
    steps: int
    branches: int = 1
    encoders: int = 0
    service: Service = Service()
    arrives: float = 0.0
    started: float = 0.0
    done: float | None = None
    had: float = 0.0
    homes: dict[int, int] = dataclasses.field(default_factory=dict)

    def wish(self) -> Wish:
        if self.encoders:
            part = Part(kind=("encoder",), size=1, homes=(None,))
            return Wish(request_id=self.name, parts=(part,), whole=True)
        parts = tuple(
            Part(kind=("step", self.kind), size=SIZES[self.kind], homes=(self.homes.get(branch),))
            for branch in range(self.branches)
        )
        return Wish(request_id=self.name, parts=parts)


class Engine:
    """Ticks `turns` against a table of true seconds, with some noise."""

    def __init__(self, turns: Turns, truth: Callable[[Load], float], noise: float = 0.0, size: int = 99) -> None:
        self.size, self.placed = size, [0] * turns.num_ranks
        self.turns, self.truth, self.noise = turns, truth, noise
        self.now, self.longest, self.random = 0.0, 0.0, random.Random(0)
        self.flight: list[Made] = []
        self.ticks: list[Turn] = []
        self.busy = [0.0] * turns.num_ranks

    def run(self, requests: list[Made], until: Callable[[], bool] | None = None) -> None:
        coming = sorted(requests, key=lambda made: made.arrives)
        while coming or self.flight:
            if until is not None and until():
                return
            if not self.flight:
                self.now = max(self.now, coming[0].arrives)
            while coming and coming[0].arrives <= self.now and len(self.flight) < self.size:
                self.flight.append(coming.pop(0))
                self.flight[-1].started = self.now
                self.turns.enter(self.flight[-1].name, self.flight[-1].service)
            self.tick()

    def tick(self) -> None:
        turn = self.turns.choose([made.wish() for made in self.flight])
        assert turn.wishes, "somebody always runs"
        chosen = [made for made in self.flight if made.name in turn.request_ids]
        loads = self.place(chosen)
        busy = [sum(map(self.truth, own)) * self.random.uniform(1, 1 + self.noise) for own in loads]
        self.now += max(busy)
        self.longest = max(self.longest, max(busy))
        self.busy = [a + b for a, b in zip(self.busy, busy, strict=True)]
        self.ticks.append(turn)
        for made in chosen:
            made.had += max(busy)
            self.step(made)
        self.turns.ran(turn, loads, busy)

    def step(self, made: Made) -> None:
        if made.encoders:
            made.encoders -= 1
        else:
            made.steps -= 1
        if not made.steps:
            made.done = self.now
            for home in made.homes.values():
                self.placed[home] -= SIZES[made.kind]
            self.flight.remove(made)
            self.turns.leave(made.name)

    def place(self, chosen: list[Made]) -> list[list[Load]]:
        """Rows live where they were first, which is where the least was then; encoders run everywhere."""
        ranks: list[dict[Any, Load]] = [{} for _ in self.busy]
        for made in chosen:
            if made.encoders:
                for own in ranks:
                    own["encoder", made.name] = Load(kind=("encoder",), requests=1, rows=1, size=1)
                continue
            for branch in range(made.branches):
                if branch not in made.homes:
                    made.homes[branch] = self.placed.index(min(self.placed))
                    self.placed[made.homes[branch]] += SIZES[made.kind]
                home = made.homes[branch]
                key = (("step", made.kind), made.name)
                rows = ranks[home][key].rows + 1 if key in ranks[home] else 1
                ranks[home][key] = Load(kind=key[0], requests=1, rows=rows, size=SIZES[made.kind])
        return [
            self.turns.joined([((k[0] if isinstance(k[0], tuple) else (k[0],), k[1]), v) for k, v in own.items()])
            for own in ranks
        ]


def seconds(
    image: float = 0.1, video: float = 10.0, encoder: float = 0.02, gain: float = 1.0
) -> Callable[[Load], float]:
    """True seconds: one row, and `gain` of it for each further row of a joined forward."""
    alone = {("step", IMAGE): image, ("step", VIDEO): video, ("encoder",): encoder}

    def truth(load: Load) -> float:
        each = alone[load.kind]
        return each * load.rows if load.requests == 1 else each * (1 + gain * (load.rows - 1))

    return truth


def engine(truth: Callable[[Load], float], ranks: int = 1, join: bool = True, **more: Any) -> Engine:
    return Engine(Turns(num_ranks=ranks, join=join, max_rows=16), truth, **more)


def test_rows_are_joined_where_that_gains_and_take_turns_where_not() -> None:
    for gain, together in ((0.5, True), (1.0, False), (1.2, False)):
        made = [Made(name=str(n), kind=IMAGE, steps=40) for n in range(4)]
        run = engine(seconds(gain=gain))
        run.run(made)
        joined = [len(turn.wishes) for turn in run.ticks[20:-5]]
        assert (set(joined) == {4}) if together else (set(joined) == {1}), gain
        if together:
            assert run.now < 4 * 40 * 0.1 * 0.65
        else:
            assert run.now < 4 * 40 * 0.1 * (1.1 if gain > 1 else 1.01), "trying cost next to nothing"


def test_deterministic_never_joins() -> None:
    run = engine(seconds(gain=0.1), join=False)
    run.run([Made(name=str(n), kind=IMAGE, steps=10) for n in range(4)])
    assert {len(turn.wishes) for turn in run.ticks} == {1}


def test_gain_that_is_lost_is_noticed_and_gain_that_comes_is_found() -> None:
    """Once measured is not for ever: memory filled up, another program ended."""
    gain = [1.2]
    run = engine(lambda load: seconds(gain=gain[0])(load))
    made = [Made(name=str(n), kind=IMAGE, steps=3000) for n in range(2)]
    run.run(made, until=lambda: run.now > 20)
    assert {len(turn.wishes) for turn in run.ticks[-50:]} == {1}
    gain[0] = 0.3
    run.run([], until=lambda: run.now > 120)
    assert {len(turn.wishes) for turn in run.ticks[-50:]} == {2}
    gain[0] = 1.5
    run.run([], until=lambda: run.now > 150)
    assert {len(turn.wishes) for turn in run.ticks[-50:]} == {1}


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_small_images_beside_a_long_video(noise: float) -> None:
    """More images than there is time for, and one video, four in flight. Each has its part; nobody waits longer than
    the bound says."""
    video = Made(name="video", kind=VIDEO, steps=30)
    images = [Made(name=f"image-{n}", kind=IMAGE, steps=20, encoders=2, arrives=1.5 * n) for n in range(300)]
    run = engine(seconds(video=1.0), noise=noise, size=4)
    run.run([video, *images], until=lambda: video.done is not None)
    ended = [image for image in images if image.done is not None]
    alone = (20 * 0.1 + 2 * 0.02) * (1 + noise)
    assert len(ended) > 20
    for image in ended:
        assert image.done - image.started <= 4 * (alone + run.longest)
    share = video.had / video.done
    assert 0.2 < share < 0.35, share


def test_bound_holds_for_any_mix() -> None:
    """k in flight from the start: done after k * (seconds alone) and k of the longest ticks."""
    for seed in range(40):
        rand = random.Random(seed)
        made = [
            Made(name=str(n), kind=rand.choice([IMAGE, VIDEO]), steps=rand.randint(1, 30), branches=rand.randint(1, 2))
            for n in range(rand.randint(1, 8))
        ]
        alone = {m.name: m.steps * m.branches * {IMAGE: 0.1, VIDEO: 3.0}[m.kind] for m in made}
        run = engine(seconds(video=3.0, gain=rand.choice([0.2, 1.0])))
        run.run(made)
        for m in made:
            assert m.done <= len(made) * (alone[m.name] + run.longest) + 1e-6, (seed, m)


def test_a_newcomer_starts_at_once() -> None:
    video = Made(name="video", kind=VIDEO, steps=100)
    image = Made(name="image", kind=IMAGE, steps=5, encoders=1, arrives=95.0)
    run = engine(seconds(video=1.0))
    run.run([video, image], until=lambda: image.done is not None)
    assert image.done - image.arrives <= 1.0 + 0.02 + 5 * 0.1 + 2 * 1.0, "what the video had before is not repaid"


def test_tenants_share_by_weight_whatever_their_number_of_requests() -> None:
    many = [Made(name=f"many-{n}", kind=IMAGE, steps=10**6, service=Service(tenant="many")) for n in range(6)]
    one = Made(name="one", kind=VIDEO, steps=10**6, service=Service(tenant="one", weight=3.0))
    run = engine(seconds(video=0.3))
    run.run([*many, one], until=lambda: run.now > 200)
    assert one.had / 200 == pytest.approx(0.75, abs=0.02)
    shares = [m.had for m in many]
    assert max(shares) - min(shares) < 1.0


def test_priority_goes_first() -> None:
    low = [Made(name=f"low-{n}", kind=IMAGE, steps=50) for n in range(3)]
    high = Made(name="high", kind=IMAGE, steps=50, service=Service(priority=1), arrives=1.0)
    run = engine(seconds(gain=1.2))
    run.run([*low, high])
    assert high.done <= 1.0 + 0.1 + 50 * 0.1 * 1.3, "but for what was tried together"
    assert all(m.done > high.done for m in low)


def test_requests_that_come_together_meet_in_their_first_step() -> None:
    made = [Made(name=str(n), kind=IMAGE, steps=10, encoders=n) for n in range(4)]
    run = engine(seconds(gain=0.5))
    run.run(made)
    assert [len(turn.wishes) for turn in run.ticks[:6]] == [1] * 6, "encoders"
    assert [len(turn.wishes) for turn in run.ticks[6:9]] == [4] * 3
    assert len(run.ticks) <= 6 + 10 + 2, "but for a trial of running alone, they stay together"


def test_a_long_encoder_waits_its_turn() -> None:
    """It is no shorter than a step, so it does not go first."""
    first = Made(name="first", kind=IMAGE, steps=300)
    slow = [Made(name=f"slow-{n}", kind=IMAGE, steps=1, encoders=3, arrives=1.0 + n) for n in range(10)]
    run = engine(seconds(encoder=2.0))
    run.run([first, *slow], until=lambda: run.now > 60)
    assert first.had >= 60 / 11 - run.longest


@pytest.mark.parametrize("join", [True, False])
def test_ranks_that_would_be_idle_take_other_requests(join: bool) -> None:
    """Two ranks, requests without guidance: rows of two requests run at once, of one kind or of two."""
    run = engine(seconds(gain=1.0), ranks=2, join=join)
    run.run([Made(name=str(n), kind=IMAGE, steps=40) for n in range(4)])
    assert run.now == pytest.approx(4 * 40 * 0.1 / 2, rel=0.1)
    assert min(run.busy) / run.now > 0.95


def test_guided_and_unguided_requests_keep_both_ranks_busy() -> None:
    made = [Made(name=str(n), kind=IMAGE, steps=40, branches=1 + n % 2) for n in range(8)]
    run = engine(seconds(gain=0.8), ranks=2, noise=0.02)
    run.run(made)
    assert min(run.busy) / run.now > 0.95


def learned(**seconds: float) -> Turns:
    """Two ranks that know what a step and a VAE call take."""
    turns = Turns(num_ranks=2, join=True, max_rows=16)
    for kind, took in seconds.items():
        for _ in range(3):
            turns.costs.learn([Load(kind=kind, requests=1, rows=1, size=SIZES[kind])], took)
    return turns


def asks(turns: Turns, *kinds: str, everywhere: bool = False) -> list[Wish]:
    wishes = []
    for number, kind in enumerate(kinds):
        turns.enter(str(number), Service())
        part = Part(kind=kind, size=SIZES[kind], homes=(None,))
        wishes.append(Wish(request_id=str(number), parts=(part,), whole=kind == "vae", everywhere=everywhere))
    return wishes


def test_a_call_that_one_rank_runs_has_company_on_the_others() -> None:
    turns = learned(vae=0.3, image=0.1)
    turn = turns.choose(asks(turns, "vae", "image", "image", "image"))
    assert turn.places == (("0", 0),)
    assert [len(turn.wishes), turn.seconds] == [4, pytest.approx(0.3)]
    assert [[(load.kind, load.rows) for load in own] for own in turn.loads] == [[("vae", 1)], [("image", 3)]]


def test_two_calls_that_one_rank_runs_each_run_at_once() -> None:
    turns = learned(vae=0.3, image=0.1)
    turn = turns.choose(asks(turns, "vae", "vae"))
    assert dict(turn.places) == {"0": 0, "1": 1}
    assert turn.seconds == pytest.approx(0.3)


def test_a_call_that_every_rank_runs_is_alone() -> None:
    turns = learned(vae=0.3, image=0.1)
    turn = turns.choose(asks(turns, "vae", "vae", everywhere=True))
    assert (len(turn.wishes), turn.places) == (1, ())


def test_a_rank_is_not_filled_with_what_would_hold_up_all() -> None:
    """An image on one rank, a video that would run a hundred times longer on the other."""
    image, video = Made(name="image", kind=IMAGE, steps=10), Made(name="video", kind=VIDEO, steps=3)
    run = engine(seconds(), ranks=2)
    run.turns.costs.learn([Load(kind=("step", IMAGE), requests=1, rows=1, size=100)], 0.1)
    run.run([image, video])
    assert image.done < 15


def test_memory_bounds_what_runs_together() -> None:
    run = Engine(Turns(num_ranks=1, join=True, max_rows=16, max_elements=3 * SIZES[IMAGE]), seconds(gain=0.1))
    run.run([Made(name=str(n), kind=IMAGE, steps=5) for n in range(5)])
    assert max(len(turn.wishes) for turn in run.ticks) == 3


def test_all_ranks_choose_alike() -> None:
    """Two copies that are told the same choose the same, tick after tick: nothing of it travels."""
    made = [Made(name=str(n), kind=IMAGE if n % 3 else VIDEO, steps=20, branches=1 + n % 2) for n in range(7)]
    run, copy = engine(seconds(video=0.7, gain=0.6), ranks=2, noise=0.3), Turns(num_ranks=2, join=True, max_rows=16)
    for m in made:
        copy.enter(m.name, m.service)
    run_turns, choose, ran, leave = run.turns, run.turns.choose, run.turns.ran, run.turns.leave

    def both_choose(wishes: Any) -> Turn:
        turn = choose(wishes)
        assert copy.choose(wishes) == turn
        return turn

    def both_ran(turn: Turn, loads: Any, busy: Any) -> None:
        ran(turn, loads, busy)
        copy.ran(turn, loads, busy)

    def both_leave(name: str) -> None:
        leave(name)
        copy.leave(name)

    run_turns.choose, run_turns.ran, run_turns.leave = both_choose, both_ran, both_leave  # type: ignore[method-assign]
    run.run(made)
    assert len(run.ticks) > 30


def test_clock_gives_nothing_for_absence_and_holds_nothing_against_it() -> None:
    clock = FairClock()
    clock.enter("a")
    clock.charge("a", 10)
    clock.enter("b")
    assert clock.time("b") == 10
    clock.charge("b", 2)
    clock.leave("b")
    clock.enter("b")
    assert clock.time("b") == 12, "leaving does not wipe out what it had"
    clock.charge("a", 50)
    clock.leave("b")
    clock.charge("a", 1)
    clock.enter("b")
    assert clock.time("b") == 61
