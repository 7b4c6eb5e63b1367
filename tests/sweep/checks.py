"""The checks of one pipeline class, to be called on ranks. A check gives "ok" or the reason why it is not."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from denoised.errors import InvalidConfigError
from denoised.outputs import Progress
from denoised.steps.task import Task
from tests.contract.support import EXACT, REORDERED, as_omni, difference, seed_of
from tests.sweep.case import Case

OK = "ok"
IN_TURN = "in turn: the pipeline changes modules that requests share, so the engine runs one of its requests at a time"
_ATTEMPTS = 5
PATIENCE = 120.0  # seconds for a request

# What the result of a pipeline may be called, if it is not its first part.
_PARTS = ("images", "frames", "video", "audios")


@dataclass(kw_only=True)
class Report:
    """Check to "ok" or a reason, and what was measured on the way."""

    checks: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    forwards: list[int] = field(default_factory=list)
    references: list[list[torch.Tensor]] = field(default_factory=list)


def on_one_rank(rank: int, world_size: int, name: str) -> Report:
    """Plain results, then alone, interleaved and cancelled through the engine."""
    case, report = case_of(name), Report()
    with quiet():
        pipeline = built(case)
        report.references = [plain(pipeline, case, i) for i in (0, 1)]
        _check_references(report.references)
        with Omni(pipeline, deterministic=True, num_threads=1) as omni:
            for check in (alone, interleaved, cancelled):
                report.checks[check.__name__] = attempt(check, omni, case, report)
        report.checks["cancelled"] = _nothing_left(report.checks["cancelled"])
    return report


def on_two_ranks(rank: int, world_size: int, name: str, references: list[list[torch.Tensor]]) -> Report:
    """Guidance branches on two ranks. Each rank has its own copy of this program, as under torchrun."""
    case, report = case_of(name), Report(references=references)
    with quiet(), as_under_torchrun(rank, world_size):
        pipeline = built(case)
        if case.double:
            pipeline.to(torch.float64)
            report.references = [plain(pipeline, case, 0)]
        parallel = DiffusionParallelConfig(cfg_parallel_size=world_size)
        try:
            with Omni(pipeline, parallel_config=parallel, deterministic=True, num_threads=1) as omni:
                report.checks["cfg_parallel"] = attempt(cfg_parallel, omni, case, report)
        except InvalidConfigError as error:
            report.checks["cfg_parallel"] = f"refused: {error}"
    return report


def attempt(check: Callable[[Omni, Case, Report], str | None], omni: Omni, case: Case, report: Report) -> str:
    try:
        return check(omni, case, report) or OK
    except Exception as error:
        return "failed: " + (" ".join(str(error).split())[:300] or type(error).__name__)


def alone(omni: Omni, case: Case, report: Report) -> None:
    """The plain pipeline's bytes, computed step by step."""
    (output,) = _generate(omni, case, 0)
    _compare(report, "alone", 0, output, EXACT)
    assert output.receipt is not None
    report.forwards = [work.forwards for work in output.receipt.ranks]
    assert report.forwards[0] >= 2, f"{report.forwards[0]} forwards went through the engine"


def interleaved(omni: Omni, case: Case, report: Report) -> str | None:
    """Two requests in flight, each step of one between steps of the other, and still the bytes of each.

    The one with fewer steps starts first and ends first: what it leaves behind would meet the other. They take
    milliseconds, so that one may be over before the other arrives; then both are sent again.
    """
    overlapped = False
    for _ in range(1 if omni.info.exclusive else _ATTEMPTS):
        events = _together(omni, case, order=(1, 0))
        outputs = {e.request_id: e for e in events if isinstance(e, OmniRequestOutput)}
        for index in (0, 1):
            _compare(report, "interleaved", index, outputs[f"i{index}"], EXACT)
        first_end = next(k for k, e in enumerate(events) if isinstance(e, OmniRequestOutput))
        stepped = {e.request_id for e in events[:first_end] if isinstance(e, Progress) and e.step}
        overlapped = overlapped or len(stepped) == 2
        if overlapped:
            break
    assert overlapped != omni.info.exclusive, f"overlapped: {overlapped}, exclusive: {omni.info.exclusive}"
    return IN_TURN if omni.info.exclusive else None


def cancelled(omni: Omni, case: Case, report: Report) -> None:
    """A request is stopped after its first step; the other one is not touched."""
    events = _together(omni, case, victim="i0")
    outputs = {e.request_id: e for e in events if isinstance(e, OmniRequestOutput)}
    assert outputs["i0"].error == "aborted", f"not stopped: {outputs['i0'].error}"
    _compare(report, "cancelled", 1, outputs["i1"], EXACT)


def cfg_parallel(omni: Omni, case: Case, report: Report) -> str | None:
    """Both ranks run forwards, and together give the plain result up to the order of sums.

    One rank runs all where there is one branch, or where the case says why a call stays whole.
    """
    (output,) = _generate(omni, case, 0)
    _compare(report, "cfg_parallel", 0, output, REORDERED)
    assert output.receipt is not None
    report.forwards = [work.forwards for work in output.receipt.ranks]
    alone = "no guidance" if case.branches == 1 else case.whole
    assert (min(report.forwards) == 0) == bool(alone), f"forwards by rank: {report.forwards}"
    return alone or None


# ---- the plain pipeline


def case_of(name: str) -> Case:
    from tests.sweep.cases import CASES

    return CASES[name]


def built(case: Case) -> Any:
    """The case's pipeline, the same in every process; some classes make weights of their own, unseeded."""
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    return pipeline


def plain(pipeline: Any, case: Case, index: int) -> list[torch.Tensor]:
    """What the unmodified pipeline gives; the global generator is seeded as the engine seeds it for each request."""
    import inspect

    parameters = inspect.signature(type(pipeline).__call__).parameters
    request = case.request(index)
    if "generator" in parameters:
        request["generator"] = torch.Generator().manual_seed(seed_of(index))
    if "output_type" in parameters:
        request["output_type"] = case.output_type
    torch.manual_seed(seed_of(index))
    return flat(_main(pipeline(**request)))


def _main(result: Any) -> Any:
    for name in _PARTS:
        if hasattr(result, name):
            return getattr(result, name)
    return result[0] if isinstance(result, tuple) else next(iter(result.values()))


def flat(value: Any) -> list[torch.Tensor]:
    """All numbers of a result, in order."""
    if isinstance(value, list | tuple):
        return [t for item in value for t in flat(item)]
    if isinstance(value, torch.Tensor):
        return [value.to(torch.float64)]
    return [torch.from_numpy(np.asarray(value)).to(torch.float64)]


def _check_references(references: list[list[torch.Tensor]]) -> None:
    """A comparison with numbers that say nothing would say nothing."""
    first, second = (torch.cat([t.flatten() for t in r]) for r in references)
    assert bool(first.isfinite().all() and second.isfinite().all()), "the plain pipeline gives no finite numbers"
    assert first.shape != second.shape or not torch.equal(first, second), "two requests give the same"
    assert float(first.std()) > 1e-4, "the plain pipeline's result is flat"


# ---- through the engine


def _generate(omni: Omni, case: Case, index: int) -> list[OmniRequestOutput]:
    prompt, params = as_omni(case.request(index), seed_of(index), _output_type(omni, case))
    outputs: list[OmniRequestOutput] = omni.generate([prompt], [params], use_tqdm=False)
    return outputs


def _output_type(omni: Omni, case: Case) -> str:
    return case.output_type if "output_type" in omni.info.parameters else "pil"


def _together(
    omni: Omni, case: Case, victim: str | None = None, order: tuple[int, ...] = (0, 1)
) -> list[Progress | OmniRequestOutput]:
    """All events of requests 0 and 1, in flight together; the victim is stopped at its first step."""
    events: list[Progress | OmniRequestOutput] = []
    done = threading.Event()

    def hear(event: Progress | OmniRequestOutput) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.step and event.request_id == victim:
            omni.abort(event.request_id)
        if sum(isinstance(e, OmniRequestOutput) for e in events) == len(order):
            done.set()

    for index in order:
        request = case.endless() if f"i{index}" == victim else case.request(index)
        prompt, params = as_omni(request, seed_of(index), _output_type(omni, case))
        omni._client.submit(omni._request(f"i{index}", prompt, params), hear)
    assert done.wait(timeout=PATIENCE), "no output in time"
    return events


def stopped_at_first_step(omni: Omni, case: Case) -> list[OmniRequestOutput]:
    """The output of request 0 alone, stopped at its first step."""
    events = _together(omni, case, victim="i0", order=(0,))
    return [event for event in events if isinstance(event, OmniRequestOutput)]


def _compare(report: Report, check: str, index: int, output: OmniRequestOutput, bound: float) -> None:
    assert output.error is None, output.error
    main = output.latents if output.latents is not None else output.images or output.videos or output.audios
    found = difference(report.references[index], flat(main))
    report.differences[check] = max(found, report.differences.get(check, 0.0))
    assert found <= bound, f"differs by {found:.1e}"


def _nothing_left(verdict: str) -> str:
    gc.collect()
    left = [t for t in gc.get_objects() if type(t) is Task]
    threads = [t for t in threading.enumerate() if t.name.startswith("task-")]
    return verdict if not left and not threads else f"{len(left)} requests and {len(threads)} threads are still held"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    from tests.tiny import small_images

    with warnings.catch_warnings(), small_images():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_under_torchrun(rank: int, world_size: int) -> Iterator[None]:
    """The environment that torchrun gives; the process group is there already."""
    given = {"TORCHELASTIC_RUN_ID": "sweep", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    before = dict(os.environ)
    os.environ |= {name: str(value) for name, value in given.items()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
