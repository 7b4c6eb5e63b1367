"""Parallel methods through the engine: how to ask for them, how they show that they acted, what must come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from tests.contract.support import (
    EXACT,
    REORDERED,
    _pipeline,
    as_omni,
    difference,
    folder,
    latent_type,
    media,
    plain,
    reference,
    request_of,
    seed_of,
)
from tests.tiny import ROWS, small_tiles
from tests.tiny.row import Request
from tests.watchdog import within

# Seconds for one run: a hang is told with stacks, long before pytest's own limit.
PATIENCE = 150.0

# For ranks: pictures of 64 pixels are of several tiles.
SMALL_TILES = ("tests.contract.small_tiles",)

# The settings that ask for a method on so many ranks.
METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    "cfg": lambda n: {"cfg_parallel_size": n},
    "ulysses": lambda n: {"ulysses_degree": n, "ulysses_mode": "advanced_uaa"},
    "ring": lambda n: {"ring_degree": n, "ulysses_mode": "advanced_uaa"},
    "tensor": lambda n: {"tensor_parallel_size": n},
    "pipeline": lambda n: {"pipeline_parallel_size": n},
    "hsdp": lambda n: {"use_hsdp": True},
    "vae_patch": lambda n: {"vae_patch_parallel_size": n},
    "text_encoder_tp": lambda n: {"text_encoder_tp_size": n},
    "expert": lambda n: {"enable_expert_parallel": True},
    "data": lambda n: {"data_parallel_size": n},
}
# Methods that act over the ranks of others: which those are, and which one to add where none is there.
OVER = {
    "expert": (("tensor", "ulysses", "ring"), "tensor"),
    "hsdp": (("cfg", "ulysses", "ring"), "cfg"),
    "vae_patch": (("cfg", "ulysses", "ring", "tensor", "pipeline"), "cfg"),
    "text_encoder_tp": (("cfg", "ulysses", "ring", "tensor", "pipeline"), "cfg"),
}
# Methods that put sums in another order, or have matrices of other shapes, for which kernels sum otherwise. With hsdp
# it is the place of a gathered weight in its cache line, by which kernels of the CPU round: on weights that lie alike,
# tests/test_hsdp.py has equal bytes. All others only say where and when something is computed.
REORDERS = frozenset({"ulysses", "ring", "tensor", "expert", "vae_patch", "text_encoder_tp", "hsdp"})
# What a method leaves in the counts of every rank that it acted on.
TRACES = {
    "ulysses": ("all_to_all",),
    "ring": ("ring_shift",),
    "tensor": ("tensor_sums",),
    "pipeline": ("blocks_run",),
    "hsdp": ("hsdp_all_gather",),
    "vae_patch": ("vae_tiles",),
    "text_encoder_tp": ("encoder_sums",),
    "expert": ("experts",),
}


def degrees_of(*methods: str, size: int = 2) -> dict[str, Any]:
    """The settings for these methods together, each on `size` ranks, and no more ranks than they need."""
    asked = list(methods)
    for method, (others, added) in OVER.items():
        if method in asked and not set(others) & set(asked):
            asked.append(added)
    degrees: dict[str, Any] = {}
    for method in asked:
        degrees |= METHODS[method](size)
    return degrees


def run(
    name: str, indexes: list[int], *, output_type: str | None = None, plugins: tuple[str, ...] = (), **degrees: Any
) -> list[OmniRequestOutput]:
    """A row's requests, all in flight together, on ranks with these degrees; never longer than PATIENCE."""
    requests = [request_of(name, index) for index in indexes]
    return run_requests(name, requests, indexes=indexes, output_type=output_type, plugins=plugins, **degrees)


def run_requests(
    name: str,
    requests: list[Request],
    *,
    indexes: Sequence[int] | None = None,
    output_type: str | None = None,
    plugins: tuple[str, ...] = (),
    **degrees: Any,
) -> list[OmniRequestOutput]:
    """The same for any requests; `indexes` choose their seeds."""
    kind = output_type or latent_type(name)
    seeds = [seed_of(index) for index in indexes or range(len(requests))]
    asked = [as_omni(request, seed, kind) for request, seed in zip(requests, seeds, strict=True)]
    return within(PATIENCE, _run, name, asked, DiffusionParallelConfig(**degrees), plugins)


def _run(
    name: str, asked: list[Any], parallel: DiffusionParallelConfig, plugins: tuple[str, ...]
) -> list[OmniRequestOutput]:
    with Omni(
        folder(name),
        parallel_config=parallel,
        num_threads=1,
        plugins=("tests.contract.rank_setup", *plugins),
        deterministic=True,
    ) as omni:
        return omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)  # type: ignore[no-any-return]


def tiled(name: str, request: Request, index: int) -> list[torch.Tensor]:
    """What the plain pipeline gives with its VAE's own tiling, in tiles as small as those of `SMALL_TILES`."""
    vae = _pipeline(folder(name)).vae
    vae.enable_tiling()
    try:
        with small_tiles():
            return plain(name, request, seed_of(index), "pt")
    finally:
        vae.disable_tiling()


def check(name: str, outputs: list[OmniRequestOutput], indexes: list[int], methods: Sequence[str]) -> None:
    """All requests give the plain pipeline's latents, as near as these methods, and those they need, allow."""
    bound = REORDERED if REORDERS & set(methods) or ROWS[name].batched else EXACT
    for index, output in zip(indexes, outputs, strict=True):
        assert output.error is None, output.error
        assert difference(reference(name, index, latent_type(name)), media(output)) <= bound, f"request {index}"


def counts(outputs: list[OmniRequestOutput]) -> list[Counter[str]]:
    """What each rank counted for all requests: one of them alone may have run on a part of the ranks."""
    total: list[Counter[str]] = [Counter() for _ in outputs[0].receipt.ranks]  # type: ignore[union-attr]
    for output in outputs:
        assert output.receipt is not None
        for rank, work in enumerate(output.receipt.ranks):
            total[rank].update(work.counts)
    return total


def acted(outputs: list[OmniRequestOutput], methods: Sequence[str]) -> None:
    """The traces of all these methods, on every rank. Those of cfg: `dealt`."""
    found = counts(outputs)
    for rank, counted in enumerate(found):
        for method in methods:
            assert all(counted[trace] > 0 for trace in TRACES.get(method, ())), (method, rank, counted)
    if "data" in methods:
        assert {output.receipt.replica for output in outputs if output.receipt} == {0, 1}
    if "cfg" in methods:
        assert all(sum(o.receipt.ranks[rank].rows for o in outputs if o.receipt) for rank in range(len(found)))


def dealt(outputs: list[OmniRequestOutput], rows: Sequence[int], degrees: dict[str, Any]) -> None:
    """Each request's rows were computed once, each at one place of the cfg axis, and every place had some."""
    shares = [by_place(output, degrees.get("cfg_parallel_size", 1)) for output in outputs]
    assert [sum(share) for share in shares] == list(rows), shares
    assert all(sum(of_place) for of_place in zip(*shares, strict=True)), shares


def by_place(output: OmniRequestOutput, num_places: int) -> list[int]:
    """A request's rows by place of the cfg axis, the outermost: all ranks of a place run the same rows."""
    assert output.receipt is not None
    rows = [work.rows for work in output.receipt.ranks]
    size = len(rows) // num_places
    places = [rows[first : first + size] for first in range(0, len(rows), size)]
    assert all(len(set(place)) == 1 for place in places), rows
    return [place[0] for place in places]
