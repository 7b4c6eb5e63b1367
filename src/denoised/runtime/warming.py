"""Compiling before the first request: the pipeline's own call, at the sizes that the settings name, before traps are
set; then its denoiser calls once more as the engine will make them, with rows apart and with rows joined.

All ranks do the same, so that collectives inside of blocks meet. What a request still has to compile later is counted
in its receipt (`recompiles`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from denoised import hf
from denoised.attention.graphs import expected
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, one_line
from denoised.features.compile import Bodies
from denoised.request import OmniDiffusionSamplingParams, PromptDict, Request
from denoised.runtime import load, model_info, program
from denoised.spec.model_spec import ModelSpec
from denoised.steps import rows
from denoised.steps.ambient import Ambient
from denoised.steps.deferred import Source
from denoised.steps.forward import Call, Stage, Target
from denoised.steps.rows import Piece, RowRules
from denoised.steps.tally import counted

_log = logging.getLogger(__name__)
# Of different lengths, so that joining them pads one.
_PROMPTS = ("a grey square", "two red circles on a wide and very quiet blue lake")
_STEPS = 2
_SIDE = 256  # pixels of the picture that models start from; they scale it


def is_asked(config: EngineConfig, device: str) -> bool:
    """Whether blocks are compiled: by the settings, or by default on accelerators if a request could use them."""
    if config.enforce_eager is None:
        return (device != "cpu" and not _gives_way(config, device)) or bool(config.compile_shapes)
    return not config.enforce_eager


def _gives_way(config: EngineConfig, device: str) -> bool:
    """Whether an adapter that is always active takes the place of compiling by default."""
    return config.enforce_eager is None and device != "cpu" and config.lora_path is not None


def tell(config: EngineConfig, device: str) -> None:
    """Say what default did not come to act."""
    if _gives_way(config, device):
        _log.info("blocks are not compiled: with lora_path=%r all of them run as they are written", config.lora_path)


def warm(
    pipe: Any, spec: ModelSpec, config: EngineConfig, bodies: Bodies, *, device: str, rules: RowRules, says: bool
) -> None:
    """Compile for all sizes. `says`: this rank tells about it.

    Raises:
        InvalidConfigError: it cannot be compiled, and the settings ask for it. By default, blocks then run as written.
    """
    sizes = config.compile_shapes or ("",)
    for size in tqdm(sizes, desc="compiling blocks", unit="size", disable=None if says else True):
        started = time.perf_counter()
        try:
            with counted() as counts, expected():
                _run(pipe, spec, config, size, device, rules)
        except Exception as error:
            _give_up(error, config, bodies, size)
            return
        if says:
            seconds, num = time.perf_counter() - started, counts["compiled_graphs"]
            _log.info("compiled %d graphs for %s in %.1f s", num, size or "the model's own size", seconds)


def _give_up(error: Exception, config: EngineConfig, bodies: Bodies, size: str) -> None:
    setting = f"compile_shapes={size!r}" if size else f"enforce_eager={config.enforce_eager}"
    problem = f"{setting}: blocks cannot be compiled ({one_line(error)}); set enforce_eager=True."
    if size or config.enforce_eager is False:
        raise InvalidConfigError(problem) from error
    bodies.off = True
    _log.warning("%s They run as they are written.", problem)


def _run(pipe: Any, spec: ModelSpec, config: EngineConfig, size: str, device: str, rules: RowRules) -> None:
    info = model_info.describe(
        pipe,
        spec,
        model=str(config.model),
        device=device,
        dtype="",
        defaults={**load.default_sampling_params(config.model), **config.default_sampling_params},
    )
    calls: dict[str, list[Call]] = {name: [] for name in spec.denoisers}
    for prompt in _PROMPTS:
        request = _request(info, prompt, size)
        seen: dict[str, Call] = {}
        with _watched(pipe, spec, seen):
            program.build(pipe, request, info, report=lambda step, of: None, observer=None)()
        for name, call in seen.items():
            calls[name].append(call)
    for found in calls.values():
        for pieces in _as_served(found, rules, join=not config.deterministic):
            rows.run(pieces, rules)


def _request(info: model_info.ModelInfo, text: str, size: str) -> Request:
    """With as few steps as all schedules can make, or those that are the model's own."""
    given: dict[str, Any] = {"num_frames": info.frame_multiple + 1} if "num_frames" in info.parameters else {}
    if "num_inference_steps" in info.parameters and not {"sigmas", "timesteps"} & info.defaults.keys():
        given["num_inference_steps"] = _STEPS
    given |= dict(zip(("width", "height", "num_frames"), map(int, size.split("x")), strict=False)) if size else {}
    prompt: PromptDict = {"prompt": text} if "prompt" in info.parameters else {}
    if "negative_prompt" in info.parameters:
        prompt["negative_prompt"] = "blur"
    if info.needs_image:
        from PIL import Image

        prompt["multi_modal_data"] = {"image": Image.new(info.image_mode, (_SIDE, _SIDE), "grey")}
    prompt, params = info.complete(prompt, OmniDiffusionSamplingParams(seed=0, output_type="latent", **given))
    return Request(request_id="warm-up", prompt=prompt, params=params, seed=0)


@dataclasses.dataclass(frozen=True)
class _watched:  # noqa: N801 - a context manager
    """Keeps the first call of each denoiser inside the block."""

    pipe: Any
    spec: ModelSpec
    seen: dict[str, Call]
    handles: list[Any] = dataclasses.field(default_factory=list)

    def __enter__(self) -> None:
        for name in self.spec.denoisers:
            self.handles.append(self._watch(name, hf.components(self.pipe)[name]))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, name: str, model: nn.Module) -> Any:
        target = Target(
            name=name,
            method="forward",
            stage=Stage.DENOISE,
            function=model.forward,
            rows_in=self.spec.rows_in,
            stores=self.spec.stores,
        )

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.seen:
                ambient, source = Ambient.capture(), Source(lambda: None)
                self.seen[name] = Call(
                    task_id="warm-up",
                    target=target,
                    args=_kept(args),
                    kwargs=_kept(kwargs),
                    branch=0,
                    ambient=ambient,
                    source=source,
                )

        return model.register_forward_pre_hook(note, with_kwargs=True)


def _kept(value: Any) -> Any:
    """Pipelines may change their tensors in place after the call."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_kept(item) for item in value)
    return {key: _kept(item) for key, item in value.items()} if type(value) is dict else value


def _as_served(calls: list[Call], rules: RowRules, *, join: bool) -> Iterator[list[Piece]]:
    """The forwards that the engine may make of these calls: a row alone, and calls joined."""
    if rules.whole or any(call.stateful for call in calls):
        return
    pieces = [Piece(call=call, rows=tuple(range(n)), batch=n) for call in calls for n in [rows.batch_size(call)]]
    for piece in pieces[:1] if pieces and pieces[0].batch > 1 else ():
        yield [dataclasses.replace(piece, rows=(0,))]
    alike = len(calls) > 1 and rows.signature(calls[0], rules) == rows.signature(calls[1], rules)
    if join and alike and rows.shares_tensors(calls[0], calls[1], rules):
        yield pieces  # of texts of two lengths, which are padded and masked
        yield [pieces[0], pieces[0]]
