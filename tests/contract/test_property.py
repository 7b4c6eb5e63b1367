"""Random degrees, sizes, lengths and steps: either the plain pipeline's latents, or one sentence that refuses them.

What is refused for the model's sake is refused before a weight is read. Nothing hangs: a watchdog shows every rank.
Here are a few cases, always the same; with DENOISED_PROPERTY_EXAMPLES=n, as scripts/test-full has it, n new ones.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, note, settings

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from denoised.config import MAX_RANKS as LARGEST_WORLD
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, InvalidRequestError
from denoised.rules import validate
from tests.contract.cases import FIELDS, MAX_RANKS, Case, cases, degrees
from tests.contract.parallel import PATIENCE, TRACES, by_place, counts
from tests.contract.reads import MARK
from tests.contract.support import (
    EXACT,
    REORDERED,
    as_omni,
    difference,
    folder,
    media,
    plain,
    rows_counted,
    seed_of,
    tiled,
)
from tests.tiny import ROWS
from tests.tiny.row import Request
from tests.watchdog import within

_asked = os.environ.get("DENOISED_PROPERTY_EXAMPLES")
_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": _asked is None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate, *((Phase.shrink,) if _asked else ())),
    "print_blob": True,
}
# What a forward that splits the sequence says of sizes, which depend on the prompt and show only there.
_TOO_SHORT = re.compile(r"tokens of \w+ (cannot be dealt evenly|are fewer than)")


@settings(**_SETTINGS, max_examples=20 * int(_asked or 20))
@given(degrees())
@example({"data_parallel_size": 10**30})
def test_validate_admits_or_says_why_not(given_: dict[str, Any]) -> None:
    """Nothing is started; whatever the fields hold, there is a config of a world that can be, or a sentence."""
    try:
        config = EngineConfig(parallel_config=DiffusionParallelConfig(**given_))
        validate(config)
    except InvalidConfigError as error:
        _check_sentence(str(error))
    else:
        assert config.parallel_config.world_size <= LARGEST_WORLD


def _admitted(given_: dict[str, Any]) -> bool:
    try:
        config = EngineConfig(parallel_config=DiffusionParallelConfig(**given_))
        validate(config)
    except InvalidConfigError:
        return False
    return config.parallel_config.world_size <= MAX_RANKS


@pytest.mark.timeout(int(PATIENCE) * 10 + 60 * int(_asked or 0))
@pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero) encountered:RuntimeWarning"
)  # one step of some schedulers
@settings(**_SETTINGS, max_examples=int(_asked or 8))
@given(cases(degrees().filter(_admitted)))
def test_same_latents_or_a_sentence(case: Case) -> None:
    mark = Path(folder(case.name)) / MARK
    mark.unlink(missing_ok=True)
    parallel = DiffusionParallelConfig(**case.degrees)
    outputs = within(PATIENCE, _run, case, parallel)
    if isinstance(outputs, InvalidConfigError):
        note(f"refused: {outputs}")
        _check_sentence(str(outputs))
        assert not mark.exists(), f"weights were read before: {outputs}"
        return
    assert mark.exists() or parallel.ranks_per_replica == 1, "the mark is never made, so its absence says nothing"
    rows = [
        _check_output(case, parallel, request, seed_of(index), output)
        for index, (request, output) in enumerate(zip(case.requests, outputs, strict=True))
    ]
    _check_together(parallel, outputs, rows)


@pytest.mark.parametrize(
    ("name", "given_", "words"),
    [
        ("qwen_image", {"cfg_parallel_size": 3, "text_encoder_tp_size": 3}, "text_encoder_tp_size=3 does not divide"),
        ("wan22_t2v", {"cfg_parallel_size": 2, "use_hsdp": True, "ulysses_degree": 3}, "does not divide the 4 heads"),
    ],
)
def test_what_the_last_components_refuse_is_refused_before_a_weight_is_read(
    name: str, given_: dict[str, Any], words: str
) -> None:
    """Encoders and the cut of the sequence come last in the order of features."""
    mark = Path(folder(name)) / MARK
    mark.unlink(missing_ok=True)
    outputs = within(PATIENCE, _run, Case(name=name, degrees=given_, requests=()), DiffusionParallelConfig(**given_))
    assert isinstance(outputs, InvalidConfigError)
    assert words in str(outputs)
    _check_sentence(str(outputs))
    assert not mark.exists()


def _run(
    case: Case, parallel: DiffusionParallelConfig
) -> list[OmniRequestOutput | InvalidRequestError] | InvalidConfigError:
    """An answer for each request, or what refused it before it was queued; or what refused the degrees."""
    plugins = ("tests.contract.rank_setup", "tests.contract.reads")
    try:
        omni = Omni(folder(case.name), parallel_config=parallel, num_threads=1, plugins=plugins, deterministic=True)
    except InvalidConfigError as error:
        return error
    with omni:
        answers: list[Any] = [_asked_for(omni, case, index) for index in range(len(case.requests))]
        good = [answer for answer in answers if not isinstance(answer, InvalidRequestError)]
        outputs = iter(omni.generate([p for p, _ in good], [s for _, s in good], use_tqdm=False))
        return [answer if isinstance(answer, InvalidRequestError) else next(outputs) for answer in answers]


def _asked_for(omni: Omni, case: Case, index: int) -> Any:
    """Prompt and parameters; or the error that refuses them."""
    try:
        prompt, params = as_omni(case.requests[index], seed_of(index), case.output_type)
        omni._request("probe", prompt, params)
    except InvalidRequestError as error:
        return error
    return prompt, params


def _check_output(
    case: Case,
    parallel: DiffusionParallelConfig,
    request: Request,
    seed: int,
    output: OmniRequestOutput | InvalidRequestError,
) -> int:
    """Gives the rows that the request had; 0 if it has no result."""
    if isinstance(output, InvalidRequestError):
        assert "\n" not in str(output)
        assert str(output).endswith(".")
        return 0
    if output.error is not None and parallel.sequence_degree > 1 and _TOO_SHORT.search(output.error):
        return 0
    try:
        with rows_counted(case.name) as rows, tiled(case.name, parallel.vae_patch_parallel_size > 1):
            expected = plain(case.name, request, seed, case.output_type)
    except Exception as problem:
        note(f"the plain pipeline raises {problem!r}")
        assert output.error is not None, "the plain pipeline fails, and the engine gives something"
        return 0
    if case.decoded and output.error is not None and "not finite" in output.error:
        assert any(part.isnan().any() for part in expected)
        return 0
    found = difference(*_without_nan(expected, media(output)))
    assert found <= _bound(case.name, parallel), f"{request} differs by {found}"
    _check_traces(case, parallel, output)
    return rows.total()


def _without_nan(expected: list[torch.Tensor], got: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
    """One step of some schedulers is no number; then it must be none here."""
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (expected, got))
    assert torch.equal(a.isnan(), b.isnan())
    return [a.nan_to_num()], [b.nan_to_num()]


def _bound(name: str, parallel: DiffusionParallelConfig) -> float:
    """Branches, stages and requests may be elsewhere; sums in another order round otherwise.

    So do kernels of the CPU by the place of a weight in its cache line, which is another where weights are gathered.
    """
    reordered = parallel.sequence_degree * parallel.tensor_parallel_size * parallel.text_encoder_tp_size > 1
    reordered = reordered or parallel.vae_patch_parallel_size > 1
    return REORDERED if reordered or parallel.use_hsdp or ROWS[name].batched else EXACT


def _check_traces(case: Case, parallel: DiffusionParallelConfig, output: OmniRequestOutput) -> None:
    """What was asked for has acted somewhere."""
    asked = {
        "ulysses": parallel.ulysses_degree > 1,
        "ring": parallel.ring_degree > 1,
        "tensor": parallel.tensor_parallel_size > 1,
        "pipeline": parallel.pipeline_parallel_size > 1,
        "hsdp": parallel.use_hsdp,
        "expert": parallel.enable_expert_parallel,
    }
    for method in (method for method, is_asked in asked.items() if is_asked):
        assert all(any(found[trace] for found in counts([output])) for trace in TRACES[method]), method
    if case.decoded and parallel.vae_patch_parallel_size > 1:
        assert output.receipt is not None
        of_one_tile = any("vae_patch_parallel_size did not act" in text for text in output.receipt.notes)
        assert of_one_tile != any(found["vae_tiles"] for found in counts([output]))


def _check_together(parallel: DiffusionParallelConfig, outputs: list[Any], rows: list[int]) -> None:
    """What requests act on together: cfg places, replicas, and text encoders, whose results others may reuse."""
    done = [(output, num) for output, num in zip(outputs, rows, strict=True) if num]
    shares = [by_place(output, parallel.cfg_parallel_size) for output, _ in done]
    assert [sum(share) for share in shares] == [num for _, num in done], "each row is computed once"
    if any(num >= 2 * output.receipt.steps for output, num in done) and parallel.cfg_parallel_size > 1:
        assert sum(any(of_place) for of_place in zip(*shares, strict=True)) > 1, shares
    if len(done) == len(outputs) > 0:
        replicas = {output.receipt.replica for output in outputs}
        assert len(replicas) == min(parallel.data_parallel_size, len(outputs)), replicas
        encoded = sum(found["encoder_sums"] for output in outputs for found in counts([output]))
        assert (encoded > 0) == (parallel.text_encoder_tp_size > 1)


def _check_sentence(text: str) -> None:
    """One sentence, and the field to change is in it."""
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?] +[A-Z]", text), text
    assert any(name in text for name in FIELDS), text
    assert len(text) <= 400
