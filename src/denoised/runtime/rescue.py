"""What to change when memory does not suffice: the settings that would fit, by the arithmetic of the plan.

Asked after the fact, on the rank that ran out: from the model's configuration files alone, without its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from denoised.config import EngineConfig
from denoised.errors import DenoisedError, InvalidConfigError
from denoised.outputs import OmniRequestOutput
from denoised.request import OmniDiffusionSamplingParams, Request
from denoised.rules import validate
from denoised.runtime import offloading
from denoised.runtime.load import dtype_name
from denoised.runtime.memory import in_use
from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.facts import ModelFacts
from denoised.runtime.planning.hardware import USABLE
from denoised.runtime.planning.layout import of_config, problem
from denoised.runtime.planning.memory import Memory, fullest_stage, held_bytes, memory
from denoised.runtime.planning.reading import ITEMSIZE, facts_of
from denoised.runtime.planning.settings import with_settings
from denoised.runtime.planning.skeleton import skeleton
from denoised.spec.registry import resolve

_log = logging.getLogger(__name__)

MB = 2**20
# Bytes of this process before any model.
_IMPORTED = {name: in_use(name) for name in ("VmSize", "VmData")}
NUM_WAYS = 3
# Side of the tiles of most VAEs, in pixels.
TILE = 512
# The method of quantization that is advised: it runs everywhere, and changes pictures least.
ADVISED = "int8_weight_only"
ADVISED_ROLES = (("denoiser",), ("denoiser", "encoder"))
# Degrees that are tried of tensor and pipeline parallelism.
DEGREES = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """Settings to change, as a user writes them, and the bytes that a rank then needs."""

    change: str
    num_bytes: float


def advised(output: OmniRequestOutput, request: Request, config: EngineConfig) -> OmniRequestOutput:
    """The output of a request that failed, with what to change if memory was the reason."""
    if output.error_kind != "out_of_memory" or output.error is None:
        return output
    return dataclasses.replace(output, error=with_advice(output.error, config, request.params))


def with_advice(text: str, config: EngineConfig, params: OmniDiffusionSamplingParams | None = None) -> str:
    """An error of memory, and the three settings that would fit. params: of the request; None: the engine starts."""
    facts = _known(config, params)
    if facts is None:
        return f"{text.rstrip('.')}; {_by_kind(config, is_request=params is not None)}."
    limit, need = _limit(config), needs(facts, config)
    best = ways(facts, config, limit)
    listed = ", ".join(f"{way.change} ({way.num_bytes / MB:.0f} MB)" for way in best)
    fit = "what would fit" if best and best[0].num_bytes <= limit else "what needs least"
    return (
        f"{text.rstrip('.')}; by the plan's arithmetic a rank needs {need / MB:.0f} MB of {limit / MB:.0f} MB; "
        f"{fit}: {listed}."
    )


def _known(config: EngineConfig, params: OmniDiffusionSamplingParams | None) -> ModelFacts | None:
    """None: of this model there is no arithmetic, or no memory to find out. Nothing else may take an error's place."""
    if _is_object(config):
        return None  # it has no configuration files
    sizes = (None, None, None) if params is None else (params.height, params.width, params.num_frames)
    try:
        facts = as_stored(_facts(str(config.model), _dtype(config), *sizes), config)
    except (DenoisedError, MemoryError):
        return None
    except Exception:
        _log.warning("what %s needs cannot be told", config.model, exc_info=True)
        return None
    return facts if params is not None else dataclasses.replace(facts, num_rows=0, decode_bytes=0.0)


def _by_kind(config: EngineConfig, *, is_request: bool) -> str:
    """What to change where nothing is known of the model: only what none refuses."""
    found = ["a smaller height and width"] if is_request else []
    if _is_object(config):
        if _is_wide(config.model):
            found.append("the pipeline in bfloat16 (.to(torch.bfloat16))")
        if _can_leave(config):
            found.append("enable_cpu_offload=True")
    elif _dtype(config) == "float32":
        found.append("dtype='bfloat16'")
    listed = ", or ".join(found) or "a smaller model, or more memory"
    return f"what it needs is not known for this model; use {listed}"


def _is_object(config: EngineConfig) -> bool:
    return not isinstance(config.model, str | Path)


def _is_wide(pipe: Any) -> bool:
    """Whether a denoiser of a pipeline object is float32."""
    return any(getattr(pipe, name).dtype == torch.float32 for name in resolve(pipe).denoisers)


def _can_leave(config: EngineConfig) -> bool:
    """Whether components of a pipeline object can take turns: on the CPU they are in no file to be read from."""
    if _device() == "cpu" or offloading.is_asked(config) or not resolve(config.model).denoisers:
        return False
    try:
        validate(dataclasses.replace(config, enable_cpu_offload=True))
    except InvalidConfigError:
        return False
    return True


@functools.lru_cache(maxsize=16)
def _facts(model: str, dtype: str, height: int | None, width: int | None, num_frames: int | None) -> ModelFacts:
    ask = Ask(height=height, width=width, num_frames=num_frames)
    return facts_of(_skeleton(model), ask, model=model, dtype=dtype)


_skeleton = functools.lru_cache(maxsize=2)(skeleton)


def as_stored(facts: ModelFacts, config: EngineConfig) -> ModelFacts:
    """The facts of a model that has a name, with weights as these settings store them. Raises as a plan does."""
    return with_settings(facts, _skeleton(facts.model), config, device=_device())


def _dtype(config: EngineConfig) -> str:
    return dtype_name(config, _device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def ways(facts: ModelFacts, config: EngineConfig, limit: float) -> list[Way]:
    """Up to three: those that fit, the ones that cost least time first; where none does, those that need least."""
    every = [Way(change=change, num_bytes=needs(f, c)) for change, f, c in _changes(facts, config)]
    every = [way for way in every if way.num_bytes < needs(facts, config)]
    fitting = _one_each([way for way in every if way.num_bytes <= limit])
    others = _one_each(sorted(every, key=lambda way: way.num_bytes))
    return (fitting or others)[:NUM_WAYS]


def _one_each(found: list[Way]) -> list[Way]:
    """The first of those that change the same settings."""
    first: dict[str, Way] = {}
    for way in found:
        first.setdefault(way.change.split("=")[0], way)
    return list(first.values())


def _changes(facts: ModelFacts, config: EngineConfig) -> Iterator[tuple[str, ModelFacts, EngineConfig]]:
    """Single changes to the settings that the engine would start with, from the one that costs least time on."""
    if facts.itemsize == ITEMSIZE["float32"]:
        yield "dtype='bfloat16'", _restored(dataclasses.replace(facts, itemsize=2, dtype="bfloat16"), config), config
    for setting in ("vae_use_tiling", "enable_cpu_offload", "enable_layerwise_offload"):
        changed = None if getattr(config, setting) else _changed(facts, config, **{setting: True})
        if changed is not None and (setting != "vae_use_tiling" or facts.vae_refusal is None):
            yield f"{setting}=True", facts, changed
    yield from _quantized(facts, config)
    for setting in ("tensor_parallel_size", "pipeline_parallel_size"):
        for degree in (d for d in DEGREES if d > getattr(config.parallel_config, setting)):
            sizes: dict[str, Any] = {setting: degree}
            parallel = dataclasses.replace(config.parallel_config, **sizes)
            changed = _changed(facts, config, parallel_config=parallel)
            if changed is not None and _is_there(parallel.world_size):
                yield f"{setting}={degree}", facts, changed
    yield from ((change, smaller, config) for change, smaller in _smaller(facts))


def _quantized(facts: ModelFacts, config: EngineConfig) -> Iterator[tuple[str, ModelFacts, EngineConfig]]:
    """The denoisers in fewer bits; then the text encoders too."""
    for roles in ADVISED_ROLES if config.quantization is None else ():
        names = [part.name for part in facts.components if part.role in roles and not part.came]
        setting: Any = ADVISED if roles == ("denoiser",) else dict.fromkeys(names, ADVISED)
        changed = _changed(facts, config, quantization=setting) if names else None
        stored = None if changed is None else _tried(facts, changed)
        if changed is not None and stored is not None:
            yield f"quantization={setting!r}", stored, changed


def _tried(facts: ModelFacts, config: EngineConfig) -> ModelFacts | None:
    """None: a component has no layers for it, or the model is an object."""
    try:
        return as_stored(facts, config)
    except DenoisedError:
        return None


def _restored(facts: ModelFacts, config: EngineConfig) -> ModelFacts:
    """Facts of which values became smaller: those that are quantized stay as large as they are."""
    quantized = facts.methods or any(part.came for part in facts.components)
    return as_stored(facts, config) if quantized else facts


def _is_there(num_ranks: int) -> bool:
    return not torch.cuda.is_available() or num_ranks <= torch.cuda.device_count()


def _changed(facts: ModelFacts, config: EngineConfig, **settings: Any) -> EngineConfig | None:
    """The settings with this change, unless the engine or the model refuses it."""
    try:
        changed = dataclasses.replace(config, **settings)
        validate(changed)
    except InvalidConfigError:
        return None
    if offloading.is_asked(changed) and facts.device == "cpu" and any(p.came for p in facts.components):
        return None  # such weights are not read again
    return None if problem(of_config(changed.parallel_config), facts) else changed


def _smaller(facts: ModelFacts) -> Iterator[tuple[str, ModelFacts]]:
    """Half of width and height, in whole blocks of 64 pixels."""
    if len(facts.size) < 2 or min(facts.size[:2]) < 128:
        return
    width, height = (side // 128 * 64 for side in facts.size[:2])
    share = width * height / (facts.size[0] * facts.size[1])
    tokens = dataclasses.replace(facts.tokens, image=int(facts.tokens.image * share))
    decoding = None if facts.decode_bytes is None else facts.decode_bytes * share
    smaller = dataclasses.replace(facts, tokens=tokens, decode_bytes=decoding, size=(width, height, *facts.size[2:]))
    yield f"height={height} and width={width}", smaller


def needs(facts: ModelFacts, config: EngineConfig) -> float:
    """Bytes of the fullest rank."""
    layout = of_config(config.parallel_config)
    if config.vae_use_tiling and facts.decode_bytes and len(facts.size) >= 2:
        share = min(1.0, TILE**2 / (facts.size[0] * facts.size[1]))
        facts = dataclasses.replace(facts, decode_bytes=facts.decode_bytes * share)
    found = memory(layout, facts)
    return resident_weights(found, facts, config) + found.working


def resident_weights(found: Memory, facts: ModelFacts, config: EngineConfig) -> float:
    """Bytes of weights that are on the device at once."""
    sizes = [_size(name, size, facts, config) for name, size in found.weights.items()]
    return max(sizes) if config.enable_cpu_offload or config.enable_layerwise_offload else sum(sizes)


def _size(name: str, size: float, facts: ModelFacts, config: EngineConfig) -> float:
    """Of one component; its blocks come one by one where they are offloaded. Of what is no denoiser they are not
    known."""
    denoiser = next((d for d in facts.denoisers if d.name == name), None)
    if denoiser is None or not denoiser.blocks or not config.enable_layerwise_offload:
        return size
    layout = of_config(config.parallel_config)
    largest = max(held_bytes(block, layout, facts.itemsize) for block in denoiser.blocks)
    there = min((config.layerwise_num_gpu_layers + 1) * largest, fullest_stage(denoiser, layout, facts.itemsize))
    return held_bytes(denoiser.rest, layout, facts.itemsize) + there


def _limit(config: EngineConfig) -> float:
    """Bytes that this rank may have."""
    if config.memory_limit_mb is not None:
        return float(config.memory_limit_mb * MB)
    if torch.cuda.is_available():
        return USABLE * torch.cuda.mem_get_info()[1]
    return min(_machine() / config.parallel_config.world_size, *_process_limits())


def _machine() -> float:
    words = Path("/proc/meminfo").read_text().split() if Path("/proc/meminfo").exists() else []
    return float(words[1]) * 1024 if words else float("inf")


def _process_limits() -> list[float]:
    """What is left for a model beside what was there when this file was imported."""
    kinds = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}
    soft = {kind: resource.getrlimit(kind)[0] for kind in kinds}
    return [
        float("inf") if value == resource.RLIM_INFINITY else max(0.0, float(value) - _IMPORTED[kinds[kind]])
        for kind, value in soft.items()
    ]
