"""Random cases for the property tests: degrees with and without sense, and requests of any size and length."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from hypothesis import strategies as st

from denoised import DiffusionParallelConfig
from tests.contract.support import latent_type, request_of
from tests.tiny.row import Request

# Double stream, single stream, cross-attention video with two experts, guidance in one batch, sound, a mixture.
NAMES = ("qwen_image", "flux_true_cfg", "wan22_t2v", "sd3", "stable_audio", "hidream_i1")
# Small for every run: each rank is a process that imports and loads.
MAX_RANKS = 8 if "DENOISED_PROPERTY_EXAMPLES" in os.environ else 4
FIELDS = [f.name for f in fields(DiffusionParallelConfig)]
AXES = ("cfg_parallel_size", "pipeline_parallel_size", "ring_degree", "ulysses_degree", "tensor_parallel_size")
WORDS = "an old red robot paints two quiet birds over the lake at night".split()


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests of a row for an engine with these degrees; `decoded`: for pictures or sound, not for latents."""

    name: str
    degrees: dict[str, Any]
    requests: tuple[Request, ...]
    decoded: bool = False

    @property
    def output_type(self) -> str:
        return "pt" if self.decoded else latent_type(self.name)


@st.composite
def degrees(draw: st.DrawFn) -> dict[str, Any]:
    """Any fields of the config, of at most MAX_RANKS ranks; often, not always, a combination that has sense."""
    found: dict[str, Any] = {}
    room = MAX_RANKS
    for name in draw(st.permutations((*AXES, "data_parallel_size"))):
        choices = [n for n in (1, 1, 1, 2, 2, 3, 4, 5, 8) if n <= room]
        if (size := draw(st.sampled_from(choices))) > 1:
            found[name] = size
            room //= size
    found |= draw(_extras(found))
    if draw(st.integers(0, 9)) == 9:
        found[draw(st.sampled_from(FIELDS))] = draw(_nonsense)
    return found


_nonsense = st.one_of(
    st.sampled_from((0, -1, -3, 2.0, 2.5, "2", "", None, True, (), float("nan"), float("inf"), 10**30)),
    st.sampled_from(("advanced_uaa", "strict", "other")),
)


@st.composite
def _extras(draw: st.DrawFn, axes: dict[str, int]) -> dict[str, Any]:
    """What comes on top of the axes: mostly left out, mostly of a size that fits."""
    ranks = prod(size for name, size in axes.items() if name != "data_parallel_size")
    sequence = axes.get("ring_degree", 1) * axes.get("ulysses_degree", 1)
    copies = axes.get("cfg_parallel_size", 1) * sequence
    sizes = st.sampled_from([n for n in range(2, MAX_RANKS + 1) if ranks % n == 0] or [1, 2])
    offers: dict[str, st.SearchStrategy[Any]] = {
        "ulysses_mode": st.just("advanced_uaa") if sequence > 1 else st.just("strict"),
        "sequence_parallel_size": st.sampled_from((sequence, sequence, 2)),
        "enable_expert_parallel": st.just(True),
        "vae_patch_parallel_size": sizes,
        "text_encoder_tp_size": sizes,
        "use_hsdp": st.just(True),
        "hsdp_replicate_size": st.sampled_from([n for n in range(1, 5) if copies % n == 0]),
        "hsdp_shard_size": st.sampled_from((-1, copies, copies // 2, 2)),
    }
    often = {"ulysses_mode": 8, "enable_expert_parallel": 1, "hsdp_replicate_size": 1, "hsdp_shard_size": 1}
    return {name: draw(value) for name, value in offers.items() if draw(st.integers(0, 9)) < often.get(name, 2)}


@st.composite
def cases(draw: st.DrawFn, degrees_: st.SearchStrategy[dict[str, Any]]) -> Case:
    name = draw(st.sampled_from(NAMES))
    requests = tuple(draw(_request(name)) for _ in range(draw(st.integers(1, 3))))
    asked = draw(degrees_)
    often = 8 if asked.get("vae_patch_parallel_size", 1) != 1 else 2  # tiles are of what is decoded
    return Case(name=name, degrees=asked, requests=requests, decoded=draw(st.integers(0, 9)) < often)


@st.composite
def _request(draw: st.DrawFn, name: str) -> Request:
    """A row's request with another prompt, other sizes, and with or without guidance."""
    request = dict(request_of(name, 0, unguided=draw(st.booleans())))
    request["prompt"] = draw(_text)
    if "negative_prompt" in request:
        request["negative_prompt"] = draw(_text)
    request["num_inference_steps"] = draw(st.integers(1, 4))
    for side in ("height", "width"):
        if side in request:
            request[side] = draw(_side)
    if "num_frames" in request:
        request["num_frames"] = draw(st.sampled_from((1, 5, 9, 13, 2, 8)))
    if "audio_end_in_s" in request:
        request["audio_end_in_s"] = draw(st.sampled_from((0.5, 1.0, 3.7, 8.0)))
    return request


_text = st.integers(0, 200).map(lambda num: " ".join(WORDS[i % len(WORDS)] for i in range(num)))
_side = st.one_of(
    st.sampled_from((16, 32, 48, 64, 80, 96)),
    st.sampled_from((16, 32, 48, 64, 80, 96)),
    st.sampled_from((16, 32, 48, 64, 80, 96)),
    st.integers(1, 100),
)
