"""Guidance in all its shapes: tuples, many branches, a user's own pipeline, guided beside unguided requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from tests.contract import own_pipeline
from tests.contract.support import as_omni, difference, engine, media, plain, reference, request_of, seed_of, tensors


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_own_pipeline_with_tuple_predictions(tmp_path: Path, ranks: int) -> None:
    """Branch i of n runs on one of the ranks, whatever n is; video and audio come back whole."""
    folder = own_pipeline.save(tmp_path / "model")
    cases = [(1, False), (2, True), (3, True), (4, False)]
    with Omni(
        folder,
        parallel_config=DiffusionParallelConfig(cfg_parallel_size=ranks),
        plugins=("tests.contract.own_pipeline",),
        num_threads=1,
        deterministic=True,
    ) as omni:
        for branches, normalize in cases:
            extra = {"num_branches": branches, "cfg_normalize": normalize}
            alone = own_pipeline.build()
            alone.set_progress_bar_config(disable=True)
            expected = alone(**extra, generator=torch.Generator().manual_seed(3))[0]
            (output,) = omni.generate([{}], OmniDiffusionSamplingParams(seed=3, extra_args=extra), use_tqdm=False)
            assert difference(tensors(expected), media(output)) == 0
            assert output.receipt is not None
            forwards = [work.forwards for work in output.receipt.ranks]
            assert sum(forwards) == 4 * branches
            assert max(forwards) - min(forwards) <= 4, "branches are dealt evenly"


def test_own_pipeline_without_its_plugin_is_refused(tmp_path: Path) -> None:
    """In a process that does not know the class: a rank."""
    folder = own_pipeline.save(tmp_path / "model")
    with pytest.raises(Exception, match="plugins"):
        Omni(folder, parallel_config=DiffusionParallelConfig(cfg_parallel_size=2))


@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_guided_and_unguided_requests_together(name: str) -> None:
    """One request with two branches and two with one, on two ranks: no row is computed twice, no rank is idle."""
    with engine(name, ranks=2, deterministic=True) as omni:
        requests = [
            as_omni(request_of(name, i, unguided), seed_of(i), "latent")
            for i, unguided in ((0, False), (1, True), (0, True))
        ]
        outputs = omni.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)
    for (i, unguided), output in zip(((0, False), (1, True), (0, True)), outputs, strict=True):
        assert difference(reference(name, i, "latent", unguided), media(output)) <= 1e-5
    rows = [sum(o.receipt.ranks[r].rows for o in outputs if o.receipt) for r in range(2)]
    assert min(rows) > 0
    expected = sum(o.receipt.steps * n for o, n in zip(outputs, (2, 1, 1), strict=True) if o.receipt)
    assert sum(rows) == expected, "every row is computed once"


def test_encoders_and_vaes_of_requests_are_dealt_to_ranks() -> None:
    """After the first of each form one rank runs it for both: as many calls in all as on one rank."""
    requests = [as_omni(request_of("qwen_image", i), seed_of(i), "pil") for i in (0, 1, 2)] * 3
    prompts = [f"{request['prompt']} {number}" for number, (request, _) in enumerate(requests)]
    calls, media_of = {}, {}
    for ranks in (1, 2):
        with engine("qwen_image", ranks=ranks, deterministic=True) as omni:
            omni.generate(*requests[0], use_tqdm=False)
            asked = [request | {"prompt": prompt} for (request, _), prompt in zip(requests, prompts, strict=True)]
            outputs = omni.generate(asked, [params for _, params in requests], use_tqdm=False)
        receipts = [output.receipt for output in outputs if output.receipt is not None]
        work = [work for receipt in receipts for work in receipt.ranks]
        calls[ranks] = [sum(w.counts.get("component_calls", 0) for w in work if w.rank == r) for r in range(ranks)]
        media_of[ranks] = [output.images[0].tobytes() for output in outputs]
        hits = {receipt.encoder_cache_hits + receipt.encoder_cache_misses for receipt in receipts}
        assert hits == {2}, "the prompt and the negative prompt"
        assert all(receipt.stage_seconds["decode"] > 0 for receipt in receipts)
        assert all(receipt.stage_peak_memory_mb["decode"] > 0 for receipt in receipts)
    assert media_of[1] == media_of[2]
    assert sum(calls[2]) == calls[1][0]
    assert min(calls[2]) > 2, "both ranks run some"


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_images_of_a_prompt(ranks: int) -> None:
    """num_outputs_per_prompt: images are rows like any other."""
    request = {**request_of("qwen_image", 0), "num_images_per_prompt": 3}
    prompt, params = as_omni(request_of("qwen_image", 0), 5, "latent")
    with engine("qwen_image", ranks=ranks, deterministic=True) as omni:
        params = dataclasses.replace(params, num_outputs_per_prompt=3)
        (output,) = omni.generate([prompt], params, use_tqdm=False)
    expected = plain("qwen_image", request, 5, "latent")
    assert media(output)[0].shape[0] == 3
    assert difference(expected, media(output)) <= (0 if ranks == 1 else 1e-5)


def test_bfloat16_on_two_ranks_equals_one_for_separate_calls() -> None:
    """One call a branch: the same forward on another rank, so equal in bf16 too. (A split batch would not be.)"""
    prompt, params = as_omni(request_of("qwen_image", 0), 5, "latent")
    results = []
    for ranks in (1, 2):
        with engine("qwen_image", ranks=ranks, dtype="bfloat16") as omni:
            (output,) = omni.generate([prompt], params, use_tqdm=False)
            results.append(media(output))
            assert output.receipt is not None
            assert output.receipt.dtype == "bfloat16"
    assert difference(*results) == 0


def test_texts_of_different_lengths_join_by_padding() -> None:
    """Two prompts and two negative prompts, none of one length: one forward a step for all four rows."""
    requests = [as_omni(request_of("qwen_image", i), seed_of(i), "latent") for i in (0, 1)]
    with engine("qwen_image") as omni:
        outputs = omni.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)
    for i, output in enumerate(outputs):
        assert difference(reference("qwen_image", i, "latent"), media(output)) <= 1e-5
        assert output.receipt is not None
        assert output.receipt.rows_joined > 0
    shared = outputs[1].receipt
    assert shared is not None
    assert shared.ranks[0].forwards == shared.steps, "both branches of both requests in one forward"


def test_what_a_pipeline_warns_of_is_in_the_receipt() -> None:
    """Guidance that cannot act, because there is no negative prompt, is said and not swallowed."""
    with engine("qwen_image") as omni:
        params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=2)
        guided, plain_one = omni.generate(
            [{"prompt": "a cat", "negative_prompt": "blurry"}, "a cat"], params, use_tqdm=False
        )
    assert guided.receipt.notes == []
    assert len(plain_one.receipt.notes) == 1
    assert "no negative_prompt is provided" in plain_one.receipt.notes[0]


def test_guidance_that_is_asked_for_acts_without_a_negative_prompt() -> None:
    """Against the empty one, in Python as on the command line."""
    request = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    with engine("qwen_image") as omni:
        prompt, params = as_omni(request, 5, "latent")
        (output,) = omni.generate([prompt], params, use_tqdm=False)
    expected = plain("qwen_image", request | {"negative_prompt": ""}, 5, "latent")
    assert difference(expected, media(output)) == 0
    assert difference(plain("qwen_image", request, 5, "latent"), media(output)) > 1e-3
    assert output.receipt is not None
    assert output.receipt.ranks[0].rows == 4
    assert output.receipt.notes == []


@pytest.mark.parametrize(("count", "joined"), [(2, False), (4, True)])
def test_joined_rows_leave_a_forward_for_each_stage(count: int, joined: bool) -> None:
    """Two requests that could share every forward are kept apart on two stages, which would not overlap otherwise."""
    with engine("qwen_image", stages=2) as omni:
        prompt, params = as_omni(request_of("qwen_image", 0, True), seed_of(0), "latent")
        outputs = omni.generate([prompt] * count, params, use_tqdm=False)
    for output in outputs:
        assert difference(reference("qwen_image", 0, "latent", True), media(output)) <= 1e-5
    assert (max(o.receipt.rows_joined for o in outputs if o.receipt) > 0) is joined
