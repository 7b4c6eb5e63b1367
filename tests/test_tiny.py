"""The tiny checkpoints are fit to compare with: whole, repeatable, and neither deaf to the prompt nor numb."""

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from tests.tiny import ROWS, UPSTREAM_WARNINGS, Request, Row, checkpoint, small_images
from tests.tiny.store import save_once

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

# Relative to the norm of the output; the largest bound of a lossless contract is about 1e-5.
VISIBLE = 0.02

disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    row: Row
    folder: Path
    pipeline: DiffusionPipeline

    def __call__(self, request: Request, output_type: str | None = None) -> torch.Tensor:
        return run(self.pipeline, request, output_type or self.row.output_type)


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: DiffusionPipeline, request: Request, output_type: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    output: Any = pipeline(**request, generator=generator, output_type=output_type, return_dict=False)[0]
    return output if isinstance(output, torch.Tensor) else torch.cat(list(output))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def num_steps(request: Request) -> int:
    """Pyramids have steps at each of their sizes."""
    pyramid: list[int] = request.get("pyramid_num_inference_steps_list", [])
    return sum(pyramid) if pyramid else int(request["num_inference_steps"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module", params=ROWS)
def loaded(request: pytest.FixtureRequest, root: Path) -> Iterator[Loaded]:
    folder = checkpoint(request.param, root)
    with small_images():
        yield Loaded(row=ROWS[request.param], folder=folder, pipeline=load(folder))


@dataclass(frozen=True)
class Call:
    timestep: float
    batch: int


@contextmanager
def recorded(pipeline: DiffusionPipeline) -> Iterator[list[Call]]:
    """The denoiser calls made within."""
    calls: list[Call] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("vision_tokens"))
        timestep = args[1] if len(args) > 1 else kwargs[next(name for name in kwargs if "timestep" in name)]
        calls.append(Call(float(timestep.flatten()[0]), len(latents)))

    names = ("transformer", "transformer_2", "unet")
    denoisers = [pipeline.components[name] for name in names if pipeline.components.get(name) is not None]
    hooks = [denoiser.register_forward_pre_hook(record, with_kwargs=True) for denoiser in denoisers]
    yield calls
    for hook in hooks:
        hook.remove()


def test_repeatable_and_decodable(loaded: Loaded) -> None:
    first = loaded(loaded.row.request(0))
    assert torch.equal(first, loaded(loaded.row.request(0)))
    assert first.isfinite().all()
    decoded = loaded(loaded.row.request(0), "pt")
    assert decoded.isfinite().all()
    assert decoded.std() > VISIBLE


def test_the_prompt_matters(loaded: Loaded) -> None:
    request = loaded.row.request(0)
    other = request | {"prompt": loaded.row.request(1)["prompt"]}
    for output_type in (loaded.row.output_type, "pt"):
        assert distance(loaded(other, output_type), loaded(request, output_type)) > VISIBLE


def test_guidance_matters(loaded: Loaded) -> None:
    if loaded.row.unguided is None:
        pytest.skip("this model has no guidance to leave out")
    assert distance(loaded(loaded.row.unguided(0)), loaded(loaded.row.request(0))) > VISIBLE


def test_requests_differ_and_run(loaded: Loaded) -> None:
    requests = [loaded.row.request(i) for i in range(3)]
    assert len({request["prompt"] for request in requests}) == 3
    assert len({num_steps(request) for request in requests}) == 3
    for request in requests[1:]:
        assert loaded(request).isfinite().all()


def test_branches_are_as_declared(loaded: Loaded) -> None:
    with recorded(loaded.pipeline) as calls:
        loaded(loaded.row.request(0))
    steps: dict[float, list[int]] = defaultdict(list)
    for call in calls:
        steps[call.timestep].append(call.batch)
    assert len(steps) == num_steps(loaded.row.request(0))
    fullest = max(steps.values(), key=sum)
    assert sum(fullest) == loaded.row.branches
    assert any(batch > 1 for batch in fullest) == loaded.row.batched


class _Slow:
    """A pipeline that takes its time to save, so that those who ask meet."""

    def save_pretrained(self, folder: Path) -> None:
        time.sleep(0.1)
        (folder / "weights").write_text("whole")


def test_one_checkpoint_for_all_who_ask(tmp_path: Path) -> None:
    row = Row(name="slow", build=_Slow, request=dict, branches=1)  # type: ignore[arg-type]
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: save_once(row, tmp_path), range(8)))
    assert set(folders) == {tmp_path / "slow"}
    assert os.listdir(tmp_path) == ["slow"]
    assert (tmp_path / "slow" / "weights").read_text() == "whole"


EDIT = "longcat_image_edit"  # has a processor, a tokenizer and a size that are found by the path of a module


def _in_a_rank(root: Path, answer: Any) -> None:
    for name in ROWS:
        checkpoint(name, root)
    with small_images():
        answer.put(run(load(root / EDIT), ROWS[EDIT].request(0), ROWS[EDIT].output_type).numpy())


def _files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_spawned_process_builds_and_runs_the_same(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    rank = context.Process(target=_in_a_rank, args=(tmp_path, answer))
    rank.start()
    ours = {name: _files(checkpoint(name, root)) for name in ROWS}
    theirs = torch.from_numpy(answer.get(timeout=200))
    rank.join()
    for name in ROWS:
        assert _files(checkpoint(name, tmp_path)) == ours[name], name
    with small_images():
        assert torch.equal(theirs, run(load(root / EDIT), ROWS[EDIT].request(0), ROWS[EDIT].output_type))
