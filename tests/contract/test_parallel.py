"""Parallel methods through the engine: alone on every row, and what is refused. Pairs are in test_pairs.py.

Every cell: requests interleaved, the plain pipeline's latents within a bound, and proof in the receipt that the method
acted on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from denoised import DiffusionParallelConfig, Omni
from denoised.errors import InvalidConfigError
from tests.contract.parallel import TRACES, acted, check, counts, dealt, degrees_of, run
from tests.contract.support import ORDER, REORDERED, as_omni, difference, folder, media, request_of, rows_of

# A sequence that nobody knows how to cut: the engine says so at start.
NO_SEQUENCE = ("sana", "sdxl")


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("method", ["ulysses", "ring", "tensor", "pipeline", "hsdp"])
@pytest.mark.cell("{method}")
def test_every_row(name: str, method: str, record_property: Callable[[str, object], None]) -> None:
    """One method on two ranks, two requests in flight."""
    degrees = degrees_of(method)
    if method in ("ulysses", "ring") and name in NO_SEQUENCE:
        with pytest.raises(InvalidConfigError, match="can be cut") as caught:
            run(name, [0], **degrees)
        record_property("refused", str(caught.value))
        return
    outputs = run(name, [0, 1], **degrees)
    check(name, outputs, [0, 1], [method])
    for rank, counted in enumerate(counts(outputs)):
        assert all(counted[trace] > 0 for trace in TRACES[method]), (rank, counted)


def test_stages_count_their_own_blocks() -> None:
    """Two guidance branches in flight on two stages: every rank runs its half of the blocks, once a row."""
    (output,) = run("qwen_image", [0], pipeline_parallel_size=2)
    assert output.receipt is not None
    for work in output.receipt.ranks:
        assert work.counts["blocks_run"] == 2 * work.forwards, work
        assert 0 < work.idle_seconds < work.seconds


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
    """Two requests in flight."""
    degrees = degrees_of(*methods)
    outputs = run(name, [0, 1], **degrees)
    check(name, outputs, [0, 1], methods)
    assert len(counts(outputs)) == 8
    acted(outputs, methods)
    dealt(outputs, [rows_of(name, index) for index in (0, 1)], degrees)


# A plugin: each rank writes down how many bytes of the denoiser it keeps once that is sharded, and how many it had.
KEPT = """
import json, pathlib
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from denoised.features import hsdp

apply = hsdp.apply

def noting(model, spec, *args):
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    gathers = apply(model, spec, *args)
    if spec is not None:
        local = [(p.to_local() if isinstance(p, DTensor) else p).untyped_storage() for p in model.parameters()]
        kept = sum({{one.data_ptr(): one.nbytes() for one in local}}.values())
        pathlib.Path({folder!r}, str(dist.get_rank())).write_text(json.dumps([kept, whole]))
    return gathers

hsdp.apply = noting
"""


def test_two_copies_of_two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HSDP over cfg and ring: each pair of ranks holds the denoiser once, half of it each."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "notes_what_is_kept.py").write_text(KEPT.format(folder=str(kept)))
    monkeypatch.syspath_prepend(str(tmp_path))
    degrees = degrees_of("cfg", "ring", "hsdp") | {"hsdp_shard_size": 2, "hsdp_replicate_size": 2}
    outputs = run("sd3", [0, 1], plugins=("notes_what_is_kept",), **degrees)
    check("sd3", outputs, [0, 1], ["cfg", "ring", "hsdp"])
    acted(outputs, ("cfg", "ring", "hsdp"))
    dealt(outputs, [rows_of("sd3", index) for index in (0, 1)], degrees)
    shares = [json.loads((kept / str(rank)).read_text()) for rank in range(4)]
    assert all(0.5 <= bytes_kept / whole < 0.54 for bytes_kept, whole in shares), shares


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


def test_a_language_model_of_another_name_is_divided_too() -> None:
    """GLM-Image's, which writes the coarse picture: its sums are counted on both ranks, on the way of a request."""
    degrees = degrees_of("cfg", "text_encoder_tp")
    outputs = run("glm_image", [0, 1], **degrees)
    check("glm_image", outputs, [0, 1], ["text_encoder_tp"])
    acted(outputs, ("cfg", "text_encoder_tp"))
    dealt(outputs, [rows_of("glm_image", index) for index in (0, 1)], degrees)
    alone = run("glm_image", [0], cfg_parallel_size=2)
    written = counts(outputs)[0]["encoder_sums"]
    assert written > 100, "of the glyphs' encoder alone there are few"
    assert counts(alone)[0]["encoder_sums"] == 0
