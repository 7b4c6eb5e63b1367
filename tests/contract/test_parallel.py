"""Parallel methods through the engine: alone on every row, in pairs and triples on representative models.

Every cell: requests interleaved, the plain pipeline's latents within a bound, and proof in the receipt that the method
acted on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from denoised.errors import InvalidConfigError
from tests.contract.support import (
    ORDER,
    REORDERED,
    as_omni,
    ask,
    difference,
    folder,
    latent_type,
    media,
    reference,
    request_of,
)

# What a method leaves in the counts of every rank that it acted on, and the settings that ask for it.
METHODS: dict[str, dict[str, Any]] = {
    "cfg": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2, "ulysses_mode": "advanced_uaa"},
    "ring": {"ring_degree": 2, "ulysses_mode": "advanced_uaa"},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}
TRACES = {
    "ulysses": ("all_to_all",),
    "ring": ("ring_shift",),
    "tensor": ("all_reduce",),
    "pipeline": ("blocks_run",),
    "hsdp": ("hsdp_all_gather",),
}
# Double stream, single stream, cross-attention video with two experts, guidance in one batch.
REPRESENTATIVE = ("qwen_image", "flux_true_cfg", "wan22_t2v", "sd3")


def run(name: str, indexes: list[int], *, output_type: str | None = None, **degrees: Any) -> list[OmniRequestOutput]:
    """A row's requests on ranks with these degrees."""
    with Omni(
        folder(name),
        parallel_config=DiffusionParallelConfig(**degrees),
        num_threads=1,
        plugins=("tests.contract.rank_setup",),
        deterministic=True,
    ) as omni:
        return ask(omni, name, indexes, output_type or latent_type(name))


def check(name: str, outputs: list[OmniRequestOutput], indexes: list[int], *, bound: float = REORDERED) -> None:
    """All requests give the plain pipeline's latents."""
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


# A sequence that nobody knows how to cut: the engine says so at start.
NO_SEQUENCE = ("sana", "sdxl")


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("method", ["ulysses", "ring", "tensor", "pipeline", "hsdp"])
@pytest.mark.cell("{method}")
def test_every_row(name: str, method: str, record_property: Callable[[str, object], None]) -> None:
    """One method on two ranks, two requests in flight."""
    degrees = {"cfg_parallel_size": 2, "use_hsdp": True} if method == "hsdp" else METHODS[method]
    if method in ("ulysses", "ring") and name in NO_SEQUENCE:
        with pytest.raises(InvalidConfigError, match="can be cut") as caught:
            run(name, [0], **degrees)
        record_property("refused", str(caught.value))
        return
    outputs = run(name, [0, 1], **degrees)
    check(name, outputs, [0, 1])
    for rank, counted in enumerate(counts(outputs)):
        assert all(counted[trace] > 0 for trace in TRACES[method]), (rank, counted)


def test_stages_count_their_own_blocks() -> None:
    """Two guidance branches in flight on two stages: every rank runs its half of the blocks, once a row."""
    (output,) = run("qwen_image", [0], pipeline_parallel_size=2)
    assert output.receipt is not None
    for work in output.receipt.ranks:
        assert work.counts["blocks_run"] == 2 * work.forwards, work
        assert 0 < work.idle_seconds < work.seconds


def pairs() -> list[tuple[str, str]]:
    names = list(METHODS)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize(("first", "second"), pairs())
def test_pairs(name: str, first: str, second: str) -> None:
    """Two methods at once on four ranks, two requests in flight."""
    outputs = run(name, [0, 1], **METHODS[first] | METHODS[second])
    check(name, outputs, [0, 1])
    for rank, counted in enumerate(counts(outputs)):
        for method in (first, second):
            assert all(counted[trace] > 0 for trace in TRACES.get(method, ())), (method, rank, counted)


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("method", ["cfg", "ulysses", "ring", "tensor", "pipeline"])
def test_hsdp_with(name: str, method: str) -> None:
    """Sharded weights below the other methods; with those that divide the weights themselves, over the cfg axis."""
    degrees = METHODS[method] | ({"cfg_parallel_size": 2} if method in ("tensor", "pipeline") else {})
    outputs = run(name, [0, 1], use_hsdp=True, **degrees)
    check(name, outputs, [0, 1])
    assert all(counted["hsdp_all_gather"] > 0 for counted in counts(outputs))


@pytest.mark.parametrize(
    "degrees",
    [
        METHODS["tensor"],
        METHODS["ulysses"],
        METHODS["ring"] | METHODS["tensor"],
        METHODS["tensor"] | METHODS["pipeline"],
        METHODS["tensor"] | {"cfg_parallel_size": 2, "use_hsdp": True},
    ],
)
def test_experts_on_ranks(degrees: dict[str, Any]) -> None:
    """Mixtures of experts dealt whole, under the other methods; each rank calls some."""
    outputs = run("hidream_i1", [0, 1], enable_expert_parallel=True, **degrees)
    check("hidream_i1", outputs, [0, 1])
    assert all(counted["experts"] > 0 for counted in counts(outputs))


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("qwen_image", ("cfg", "ulysses", "tensor")),
        ("wan22_t2v", ("cfg", "pipeline", "ulysses")),
        ("flux_true_cfg", ("ring", "ulysses", "tensor")),
        ("sd3", ("cfg", "pipeline", "ring")),
    ],
)
def test_triples_on_eight_ranks(name: str, methods: tuple[str, ...]) -> None:
    degrees: dict[str, Any] = {}
    for method in methods:
        degrees |= METHODS[method]
    outputs = run(name, [0], **degrees)
    check(name, outputs, [0])
    assert len(counts(outputs)) == 8


def test_text_encoders_on_two_ranks() -> None:
    outputs = run("qwen_image", [0, 1], cfg_parallel_size=2, text_encoder_tp_size=2)
    check("qwen_image", outputs, [0, 1])
    assert all(counted["all_reduce"] > 0 for counted in counts(outputs))


def test_no_text_encoder_to_share_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="text_encoder_tp_size=2: .* has no text encoder"):
        run("cosmos3_image", [0], cfg_parallel_size=2, text_encoder_tp_size=2)


def test_vae_tiles_on_two_ranks() -> None:
    """Decoded pictures are those of the same VAE's own tiles; each rank decoded some of them."""
    settings: dict[str, Any] = {"num_threads": 1, "deterministic": True}
    prompt, params = as_omni(request_of("sd3", 0) | {"height": 64, "width": 96}, 3, "pt")
    with Omni(folder("sd3"), vae_use_tiling=True, **settings) as alone:
        (expected,) = alone.generate([prompt], params, use_tqdm=False)
    parallel = DiffusionParallelConfig(tensor_parallel_size=2, vae_patch_parallel_size=2)
    with Omni(folder("sd3"), parallel_config=parallel, **settings) as shared:
        (got,) = shared.generate([prompt], params, use_tqdm=False)
    assert difference(media(expected), media(got)) <= REORDERED
    tiles = [counted["vae_tiles"] for counted in counts([got])]
    assert min(tiles) > 0, tiles
    assert max(tiles) - min(tiles) <= 1, tiles
    assert got.receipt is not None
    assert got.receipt.notes == []


def test_a_picture_of_one_tile_is_noted() -> None:
    """Nothing to deal: the receipt says so."""
    outputs = run("sd3", [0], tensor_parallel_size=2, vae_patch_parallel_size=2, output_type="pt")
    assert outputs[0].receipt is not None
    assert "vae_patch_parallel_size did not act" in outputs[0].receipt.notes[0]


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensor_parallel_size": 3}, ("tensor_parallel_size=3", "use 1, 2")),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, ("enable_expert_parallel=True", "leave it off")),
        ({"enable_expert_parallel": True}, ("enable_expert_parallel=True", "tensor_parallel_size")),
        ({"pipeline_parallel_size": 9}, ("pipeline_parallel_size=9", "at most 4")),
        ({"vae_patch_parallel_size": 2}, ("vae_patch_parallel_size", "divide")),
        ({"cfg_parallel_size": 2, "text_encoder_tp_size": 4}, ("text_encoder_tp_size", "divide")),
        ({"use_hsdp": True}, ("use_hsdp=True", "equal weights")),
        ({"hsdp_shard_size": 2}, ("hsdp_shard_size", "use_hsdp=True")),
        ({"cfg_parallel_size": 2, "use_hsdp": True, "hsdp_shard_size": 4}, ("hsdp_shard_size", "make them agree")),
        ({"ulysses_mode": "advanced_uaa"}, ("advanced_uaa", "ulysses_degree")),
        (
            {"cfg_parallel_size": 2, "use_hsdp": True, "text_encoder_tp_size": 2},
            ("text_encoder_tp_size", "use_hsdp=True"),
        ),
    ],
)
def test_what_cannot_act_is_refused(degrees: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        run("qwen_image", [0], **degrees)
    assert all(word in str(caught.value) for word in words), caught.value
