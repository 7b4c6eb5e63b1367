"""What is learned from measured ticks, and whether the ends told from it come true: by simulation, with noise."""

from __future__ import annotations

import random
from statistics import median

import pytest

from denoised.request import Service
from denoised.runtime.cost import Cost
from denoised.runtime.cost_model import FIRST_GUESS, TRUST, CostModel, Load
from denoised.runtime.forecast import Ends, Job, Times, forecast, job_of
from denoised.runtime.protocol import StepCost
from denoised.runtime.scheduler import Scheduler
from denoised.runtime.turns import Turns
from tests.test_turns import IMAGE, SIZES, VIDEO, Engine, Made, seconds

STEP = "step"


def load(rows: int, requests: int = 1, kind: str = IMAGE, size: int = 100) -> Load:
    return Load(kind=(STEP, kind), requests=requests, rows=rows, size=size)


def test_starts_from_elements_and_rows_and_goes_over_to_what_was_measured() -> None:
    costs = CostModel()
    assert costs.seconds(load(3)) == pytest.approx(3 * 100 * FIRST_GUESS)
    assert not costs.knows(load(1))
    costs.learn([load(1)], 0.5)
    assert costs.knows(load(3))
    assert costs.seconds(load(3)) == pytest.approx(1.5)
    assert costs.seconds(load(1, kind=VIDEO, size=1000)) == pytest.approx(5.0), "like its nearest, by elements"
    costs.learn([load(3)], 1.2)
    assert costs.seconds(load(3)) == pytest.approx(1.2)


def test_one_slow_tick_does_not_count_for_long() -> None:
    costs = CostModel()
    for measured in (9.0, 0.1, 0.1, 5.0, 0.1):
        costs.learn([load(1)], measured)
    assert costs.seconds(load(1)) == 0.1


def test_joining_is_hoped_for_until_it_was_tried() -> None:
    costs = CostModel()
    costs.learn([load(1)], 1.0)
    assert 1.0 < costs.seconds(load(4, 4)) < 4.0
    for _ in range(TRUST):
        assert costs.seconds(load(4, 4)) < 4.0
        costs.learn([load(4, 4)], 4.4)
    assert costs.seconds(load(4, 4)) == pytest.approx(4.4)
    assert costs.seconds(load(3, 3)) - costs.seconds(load(2, 2)) == pytest.approx(1.0), "no gain there either"


def test_what_ran_together_is_told_apart() -> None:
    """Two kinds in one tick, each also alone now and then."""
    costs, rand = CostModel(), random.Random(0)
    truth = {IMAGE: 0.2, VIDEO: 3.0}
    for _ in range(60):
        kinds = rand.choice([[IMAGE], [VIDEO], [IMAGE, VIDEO]])
        loads = [load(1, kind=kind, size=SIZES[kind]) for kind in kinds]
        costs.learn(loads, sum(truth[kind] for kind in kinds) * rand.uniform(0.95, 1.05))
    for kind, real in truth.items():
        assert costs.seconds(load(1, kind=kind, size=SIZES[kind])) == pytest.approx(real, rel=0.1)


def test_stages_overlap_rows_of_one_tick() -> None:
    """Two stages: one row takes both in turn; of many, the second stage runs one while the first runs the next."""
    costs = CostModel(num_stages=2)
    costs.learn([load(1)], 1.0)
    assert costs.rank_seconds([load(1)]) == pytest.approx(1.0)
    costs.learn([load(1, kind=VIDEO)], 1.0)
    assert costs.rank_seconds([load(1), load(1, kind=VIDEO)]) == pytest.approx(1.5)


def job(name: str, steps: float, step: float = 1.0, **more: object) -> Job:
    made = Job(request_id=name, size=step, steps=steps, ends=Ends(), step=StepCost(seconds=(step,)), **more)  # type: ignore[arg-type]
    made.begin(0)
    return made


def test_forecast_by_hand() -> None:
    """a and b share the machine; c starts when a ends."""
    ends, starts = forecast([[job("a", 2), job("b", 4)]], [job("c", 1)], 2)
    assert ends == pytest.approx({"a": 4.0, "c": 6.0, "b": 7.0})
    assert starts == pytest.approx({"c": 4.0})
    ends, _ = forecast([[job("a", 2, priority=1), job("b", 2)]], [], 2)
    assert ends == pytest.approx({"a": 2.0, "b": 4.0}, abs=1e-6)
    ends, _ = forecast([[job("a", 3, tenant="a", weight=3.0), job("b", 3, tenant="b")]], [], 2)
    assert ends == pytest.approx({"a": 4.0, "b": 6.0})
    ends, _ = forecast([[job("a", 2)], [job("b", 1)]], [job("c", 1), job("d", 1)], 1)
    assert ends == pytest.approx({"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0})


def test_forecast_of_requests_that_share_forwards_or_ranks() -> None:
    pair = StepCost(seconds=(1.0, 1.2))
    together = [job(name, 10) for name in "ab"]
    for each in together:
        each.step = pair
    assert forecast([together], [], 2)[0] == pytest.approx({"a": 12.0, "b": 12.0})
    half = [job("a", 10), job("b", 10, 2.0)]
    for each in half:
        each.step = StepCost(seconds=each.step.seconds, share=0.5)
    assert forecast([half], [], 2)[0] == pytest.approx({"a": 10.0, "b": 20.0}), "each uses one of two ranks"


def told(run: Engine, scheduler: Scheduler, times: Times, costs: dict[str, Cost]) -> dict[str, float]:
    """Ends as the client tells them, from what the ranks tell it."""
    for made in run.flight:
        if not made.encoders:
            times.learn_step(costs[made.name].per_step, run.turns.step_cost(made.wish()))
        scheduler.progress(made.name, int(costs[made.name].steps - made.steps), int(costs[made.name].steps))
    jobs = [[_job(entry, times) for entry in lane] for lane in scheduler.lanes]
    ends, _ = forecast(jobs, [_job(entry, times) for entry in scheduler.queue()], run.size)
    return {name: run.now + left * times.stretch for name, left in ends.items()}


def _job(entry: object, times: Times) -> Job:
    return job_of(entry.request_id, entry.cost, times, steps_left=entry.steps_left, begun=entry.begun)  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ends_that_are_told_come_true(ranks: int) -> None:
    """A mix of sizes, steps and guidance, four in flight, the rest queued, ticks with 20% of noise: the median error
    of all that was told, of queued and running ones, at all times, is within 20%."""
    rand = random.Random(1)
    made = [
        Made(
            name=str(n),
            kind=VIDEO if n % 6 == 0 else IMAGE,
            steps=rand.choice([10, 20, 40]),
            branches=rand.choice([1, 2]),
            encoders=2,
        )
        for n in range(40)
    ]
    costs = {m.name: Cost(per_step=SIZES[m.kind] * m.branches, steps=m.steps) for m in made}
    truth = seconds(image=0.1, video=0.8, gain=0.6)
    run, times = Engine(Turns(num_ranks=ranks, join=True, max_rows=16), truth, noise=0.2, size=4), Times()
    times.learn_ends(SIZES[IMAGE], 0.04, 0.0)
    scheduler = Scheduler(4)
    for m in made:
        scheduler.add(m.name, costs[m.name], service=Service())
    by_name = {m.name: m for m in made}
    words: list[tuple[float, str, float]] = []
    while scheduler.running or scheduler.num_waiting:
        for name in scheduler.admit():
            run.flight.append(by_name[name])
            by_name[name].started = run.now
            run.turns.enter(name, Service())
        if len(run.ticks) % 25 == 10:
            words += [(run.now, name, end) for name, end in told(run, scheduler, times, costs).items()]
        run.tick()
        for name in [m.name for m in made if m.done is not None and m.name in scheduler.running]:
            scheduler.remove(name)
            guesses = [(now, end) for now, word_of, end in words if word_of == name and now >= by_name[name].started]
            if guesses:
                now, end = guesses[-1]
                times.learn_stretch((end - now) / times.stretch, by_name[name].done - now)
    errors = [abs(end - by_name[name].done) / (by_name[name].done - now) for now, name, end in words]
    assert len(errors) > 200
    assert median(errors) < 0.2, median(errors)
    queued = [abs(e - by_name[n].done) / (by_name[n].done - t) for t, n, e in words if by_name[n].done - t > 20]
    assert median(queued) < 0.2
