"""Ranks as actors of a Ray cluster, on simulated nodes of one place each: the same results as the plain pipeline, also
when ranks and nodes are lost; and what a cluster lacks is said at once.

One cluster for all tests; importing torch and diffusers is most of an actor's start, so there are few engines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from denoised import DiffusionParallelConfig, Omni
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError
from denoised.rules import validate
from denoised.runtime import ray_cluster, ray_ranks
from denoised.runtime.ray_rank import Place, interface_of
from tests.contract.support import REORDERED, as_omni, difference, folder, media, plain, reference, request_of, seed_of
from tests.test_replicas import LONG, Asked

pytestmark = pytest.mark.timeout(900)
NAME = "qwen_image"
# Ray's own; the default takes half a minute to notice that a node is gone.
NOTICE_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `~` means on the first node, and nowhere else."""
    path: Path = tmp_path_factory.mktemp("home")
    shutil.copytree(folder(NAME), path / "tiny")
    return path


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    """A head with one CPU, and a node with one; its workers find our tests."""
    search = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    before = dict(os.environ)
    os.environ |= {"HOME": str(home), "PYTHONPATH": search}
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": NOTICE_SOON},
    )
    made.add_node(num_cpus=1, env_vars={"HOME": "/nowhere"})
    os.environ["RAY_ADDRESS"] = made.address
    ray_cluster.connect()
    yield made
    ray.shutdown()
    made.shutdown()
    os.environ.clear()
    os.environ |= before


def omni(model: str | None = None, **degrees: Any) -> Omni:
    return Omni(
        model or folder(NAME),
        parallel_config=DiffusionParallelConfig(**degrees),
        distributed_executor_backend="ray",
        num_threads=1,
        plugins=("tests.contract.rank_setup",),
    )


def until(condition: Callable[[], bool]) -> None:
    """Longer than actors take to import torch on a busy machine."""
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def output(engine: Omni, index: int) -> Any:
    prompt, params = as_omni(request_of(NAME, index), seed_of(index), "latent")
    (result,) = engine.generate(prompt, params, use_tqdm=False)
    return result


def off(result: Any, index: int) -> float:
    return difference(reference(NAME, index, "latent"), media(result))


def test_what_the_cluster_lacks_is_said_with_numbers(cluster: Cluster) -> None:
    started = time.monotonic()
    said = r"cfg 3 .*: 3 ranks need 3 CPUs, and the nodes .* have 2 \(\S+ has 1, \S+ has 1\); lower a degree"
    with pytest.raises(InvalidConfigError, match=said):
        omni(cfg_parallel_size=3)
    assert time.monotonic() - started < ray_cluster.PATIENCE / 2, "places that will never be are not waited for"


def test_a_node_without_the_model_is_named(cluster: Cluster) -> None:
    address = ray_cluster.nodes()[0][0]
    with pytest.raises(ModelError, match=rf"^node {address}: there is no folder ~/tiny; copy the model there"):
        omni("~/tiny", cfg_parallel_size=2)


def test_places_that_others_have_are_not_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PATIENCE", 2.0)
    taken = ray_cluster.reserve(1)
    with pytest.raises(InvalidConfigError, match=r"2 ranks need 2 CPUs, and 1 of the .* 2 are free after 2 seconds"):
        omni(cfg_parallel_size=2)
    ray.util.remove_placement_group(taken)


def test_branches_on_two_nodes_and_a_rank_that_is_killed(cluster: Cluster) -> None:
    with omni(cfg_parallel_size=2) as engine:
        assert len(set(engine.rank_pids)) == 2
        result = output(engine, 0)
        assert off(result, 0) == 0
        steps = request_of(NAME, 0)["num_inference_steps"]
        assert [work.forwards for work in result.receipt.ranks] == [steps, steps], "a branch on each"
        asked = Asked(engine)
        asked.ask("long", 1, num_inference_steps=LONG)
        asked.until(lambda: asked.steps.get("long", 0) > 2)
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        until(lambda: "long" in asked.outputs)
        assert engine.restarts == asked.restarts("long") == 1
        assert difference(long_reference(), media(asked.outputs["long"])) == 0


@contextlib.contextmanager
def stopped_ranks_of(node: Any) -> Iterator[None]:
    """A machine that is gone computes nothing; what it ran here must not end before its loss is noticed."""
    (raylet,) = node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    for worker in workers:
        worker.suspend()
    yield
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def long_reference(num_steps: int = LONG) -> Any:
    return plain(NAME, request_of(NAME, 1) | {"num_inference_steps": num_steps}, seed_of(1), "latent")


def test_sequence_over_two_nodes(cluster: Cluster) -> None:
    with omni(ulysses_degree=2) as engine:
        result = output(engine, 0)
    assert off(result, 0) <= REORDERED
    assert all(work.counts["sequence_attention"] > 0 for work in result.receipt.ranks)


def test_a_node_that_goes_leaves_its_requests_to_the_others(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PATIENCE", 5.0)
    with omni(data_parallel_size=2) as engine:
        asked = Asked(engine)
        for name in ("a", "b"):
            asked.ask(name, 1, num_inference_steps=10 * LONG)
        asked.until(lambda: {"a", "b"} <= asked.steps.keys())
        (gone,) = cluster.worker_nodes
        with stopped_ranks_of(gone):
            cluster.remove_node(gone, allow_graceful=False)
        until(lambda: {"a", "b"} <= asked.outputs.keys())
        assert sorted(asked.restarts(name) for name in ("a", "b")) == [0, 1]
        assert asked.replica("a") == asked.replica("b"), "the node that is left"
        for name in ("a", "b"):
            assert difference(long_reference(10 * LONG), media(asked.outputs[name])) <= REORDERED
    with pytest.raises(InvalidConfigError, match="2 ranks need 2 CPUs, and the nodes of the Ray cluster have 1 "):
        omni(cfg_parallel_size=2)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InvalidConfigError, match="RAY_ADDRESS='127.0.0.1:1': no Ray cluster answers there"):
        omni()


# ---- without a cluster


def test_settings_that_cannot_go_with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfigError, match="takes a model that every node can read"):
        validate(EngineConfig(model=object(), distributed_executor_backend="ray"))
    with pytest.raises(InvalidConfigError, match="distributed_executor_backend='slurm'"):
        EngineConfig(distributed_executor_backend="slurm")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InvalidConfigError, match="cannot go with torchrun"):
        validate(EngineConfig(distributed_executor_backend="ray"))


def test_without_ray_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import system that finds everything but ray, as where it is not installed."""
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else here(name))
    with pytest.raises(InvalidConfigError, match=r"needs Ray, which is not installed; pip install 'denoised\[ray\]'"):
        validate(EngineConfig(distributed_executor_backend="ray"))


def test_ranks_of_a_node_are_neighbours_and_share_its_cores() -> None:
    places = [Place(node=node, address=node, pid=1, version="") for node in "babba"]
    order = ray_ranks._order(places)
    assert order == [1, 4, 0, 2, 3]
    specs = ray_ranks._specs(EngineConfig(), [places[bundle] for bundle in order], "tcp://x:1", num_replicas=2)
    assert [spec.local_world_size for spec in specs] == [4, 4, 6, 6, 6]
    assert [spec.rank for spec in specs] == [0, 1, 2, 3, 4]


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
