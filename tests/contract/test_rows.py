"""Every declared spec and four pipelines without one: same request, same result as the plain pipeline."""

from __future__ import annotations

import gc
import random
import threading

import pytest

from denoised import OmniRequestOutput
from denoised.outputs import Progress
from denoised.steps.task import Task
from tests.contract.parallel import dealt
from tests.contract.support import (
    EXACT,
    ORDER,
    REORDERED,
    as_omni,
    ask,
    difference,
    engine,
    latent_type,
    media,
    plain,
    reference,
    request_of,
    rows_counted,
    rows_of,
    seed_of,
)
from tests.tiny import ROWS

every_row = pytest.mark.parametrize("name", ORDER)


@every_row
@pytest.mark.cell("alone")
def test_alone_with_encoders_and_vae(name: str) -> None:
    """One request, decoded: text encoders, denoiser and VAE give the plain pipeline's bytes."""
    with engine(name) as omni:
        (output,) = ask(omni, name, [0], "pt")
        (again,) = ask(omni, name, [0], "pt")
    assert difference(reference(name, 0, "pt"), media(output)) == EXACT
    assert difference(reference(name, 0, "pt"), media(again)) == EXACT
    receipt = again.receipt
    assert receipt is not None
    assert receipt.steps >= 2
    assert receipt.ranks[0].forwards >= receipt.steps
    assert receipt.encoder_cache_hits > 0, "the same prompt was encoded again"
    assert receipt.encoder_cache_misses == 0


@every_row
@pytest.mark.cell("interleaved")
def test_interleaved_at_random(name: str) -> None:
    """Three requests of different steps and sizes, admitted at random moments of each other."""
    rng = random.Random(name)
    kind = latent_type(name)
    outputs, overlaps = {}, 0
    with engine(name, deterministic=True) as omni:
        inbox: list[Progress | OmniRequestOutput] = []
        arrived = threading.Condition()

        def hear(event: Progress | OmniRequestOutput) -> None:
            with arrived:
                inbox.append(event)
                arrived.notify()

        waiting = [0, 1, 2]
        rng.shuffle(waiting)
        in_flight: set[int] = set()
        while len(outputs) < 3:
            if waiting and (not in_flight or rng.random() < 0.5):
                index = waiting.pop()
                prompt, params = as_omni(request_of(name, index), seed_of(index), kind)
                omni._client.submit(omni._request(str(index), prompt, params), hear)
                in_flight.add(index)
            overlaps += len(in_flight) > 1
            with arrived:
                arrived.wait_for(lambda: bool(inbox), timeout=60)
                event = inbox.pop(0)
            if isinstance(event, OmniRequestOutput):
                outputs[int(event.request_id)] = event
                in_flight.discard(int(event.request_id))
    assert overlaps, "the requests never overlapped"
    for index, output in outputs.items():
        assert difference(reference(name, index, kind), media(output)) == EXACT, f"request {index}"
        assert output.receipt is not None
        assert output.receipt.rows_joined == 0


@pytest.mark.parametrize("name", [name for name in ORDER if ROWS[name].joins])
@pytest.mark.cell("joined")
def test_joined(name: str) -> None:
    """Requests whose rows have one shape share forwards."""
    kind = latent_type(name)
    with engine(name) as omni:
        prompt, params = as_omni(request_of(name, 0), 0, kind)
        import dataclasses

        seeds = [seed_of(0), 7, 8]
        outputs = omni.generate([prompt] * 3, [dataclasses.replace(params, seed=s) for s in seeds], use_tqdm=False)
    assert difference(reference(name, 0, kind), media(outputs[0])) <= REORDERED
    assert difference(media(outputs[0]), media(outputs[1])) > 1e-3, "other seeds give other pictures"
    receipt = outputs[0].receipt
    assert receipt is not None
    assert receipt.rows_joined > 0
    assert receipt.rows_joined <= receipt.ranks[0].rows


@every_row
@pytest.mark.cell("cancel")
def test_cancelled_at_a_random_step(name: str) -> None:
    """One of three requests is stopped in the middle; the others give their bytes, and its memory is released."""
    rng = random.Random(name)
    kind = latent_type(name)
    with engine(name, deterministic=True) as omni:
        stop_at = rng.randint(1, 2)
        done = threading.Event()
        outputs: dict[str, OmniRequestOutput] = {}

        def hear(event: Progress | OmniRequestOutput) -> None:
            if isinstance(event, OmniRequestOutput):
                outputs[event.request_id] = event
                if len(outputs) == 3:
                    done.set()
            elif event.request_id == "victim" and event.step == stop_at:
                omni.abort("victim")

        for request_id, index in (("0", 0), ("victim", 2), ("1", 1)):
            prompt, params = as_omni(request_of(name, index), seed_of(index), kind)
            omni._client.submit(omni._request(request_id, prompt, params), hear)
        assert done.wait(timeout=60)
        assert outputs["victim"].error == "aborted"
        for index in (0, 1):
            assert difference(reference(name, index, kind), media(outputs[str(index)])) == EXACT
        outputs.clear()
        gc.collect()
        left = [t for t in gc.get_objects() if type(t) is Task]
        assert not left, "a finished or cancelled request is still held"
        assert not [t for t in threading.enumerate() if t.name.startswith("task-")]


@every_row
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.cell("cfg{ranks}")
def test_cfg_parallel(name: str, ranks: int) -> None:
    """Guidance branches are dealt to ranks: every rank that has a branch does just its own forwards."""
    row, kind = ROWS[name], latent_type(name)
    bound = REORDERED if row.batched else EXACT
    with engine(name, ranks=ranks, deterministic=True) as omni:
        (alone,) = ask(omni, name, [0], kind)
        outputs = ask(omni, name, [0, 1, 2], kind)
    for index, output in enumerate(outputs):
        assert difference(reference(name, index, kind), media(output)) <= bound, f"request {index}"
    assert difference(reference(name, 0, kind), media(alone)) <= bound
    assert alone.receipt is not None
    busy = [work for work in alone.receipt.ranks if work.forwards]
    assert len(busy) == min(ranks, row.branches), alone.receipt.ranks
    assert max(work.rows for work in busy) <= -(-sum(w.rows for w in busy) // len(busy)) + alone.receipt.steps


@pytest.mark.parametrize("name", ["wan22_t2v", "wan22_i2v"])
def test_both_experts_run(name: str) -> None:
    """Each of the two has the rows that it has in the plain pipeline, on either side of the boundary."""
    with rows_counted(name) as expected:
        plain(name, request_of(name, 0), seed_of(0), latent_type(name))
    with engine(name) as omni:
        (output,) = ask(omni, name, [0], latent_type(name))
    assert output.receipt is not None
    counts = output.receipt.ranks[0].counts
    assert {n: counts[f"rows_of_{n}"] for n in ("transformer", "transformer_2")} == expected
    assert min(expected.values()) > 0


def test_four_branches_on_four_ranks() -> None:
    """LTX-2's: every rank has one of each step."""
    with engine("ltx2", ranks=4, deterministic=True) as omni:
        outputs = ask(omni, "ltx2", [0, 1], latent_type("ltx2"))
        (alone,) = ask(omni, "ltx2", [0], latent_type("ltx2"))
    for index, output in enumerate(outputs):
        assert difference(reference("ltx2", index, latent_type("ltx2")), media(output)) <= REORDERED
    assert alone.receipt is not None
    assert [work.rows for work in alone.receipt.ranks] == [alone.receipt.steps] * 4
    dealt(outputs, [rows_of("ltx2", index) for index in (0, 1)], {"cfg_parallel_size": 4})


def forwards_by_rank(outputs: list[OmniRequestOutput]) -> list[int]:
    receipts = [output.receipt for output in outputs if output.receipt is not None]
    return [sum(receipt.ranks[rank].forwards for receipt in receipts) for rank in (0, 1)]


with_unguided = pytest.mark.parametrize(
    "name", [name for name in ORDER if ROWS[name].unguided or ROWS[name].branches == 1]
)


@with_unguided
@pytest.mark.cell("both ranks busy")
def test_unguided_requests_fill_both_ranks(name: str) -> None:
    """Without guidance there is one row a step: two requests run on two ranks, nothing is computed twice."""
    row, kind = ROWS[name], latent_type(name)
    unguided = row.unguided is not None
    with engine(name, ranks=2, deterministic=True) as omni:
        alone = [ask(omni, name, [index], kind, unguided=unguided)[0] for index in (0, 1)]
        outputs = ask(omni, name, [0, 1], kind, unguided=unguided)
    forwards = forwards_by_rank(outputs)
    for index, output in enumerate(outputs):
        assert difference(reference(name, index, kind, unguided), media(output)) == EXACT
    assert min(forwards) > 0, "both ranks ran some"
    assert sum(forwards) == sum(forwards_by_rank(alone)), "and none twice"
