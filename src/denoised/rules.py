"""`validate()`, and THE table of what may go together: what is refused before anything is loaded, and the way out.

Nothing here imports torch. What depends on the model is refused by the features themselves.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoised.config import MAX_RANKS, QUANTIZATIONS, EngineConfig
from denoised.errors import InvalidConfigError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the table: `broken(config)` says that these settings cannot start; `message` names the way out."""

    broken: Callable[[EngineConfig], bool]
    message: str


def _over_ranks(name: str) -> Rule:
    """A degree that is no axis of its own: blocks of so many neighbours among a replica's ranks."""

    def broken(config: EngineConfig) -> bool:
        return bool(config.parallel_config.ranks_per_replica % getattr(config.parallel_config, name))

    message = (
        f"{name} must divide the ranks that the other degrees give (cfg x pipeline x ring x ulysses x tensor); "
        "lower it, or raise cfg_parallel_size or ulysses_degree."
    )
    return Rule(broken=broken, message=message)


def _quantizer(method: Any) -> str | None:
    """The package that a method of quantization needs; None: there is no such method."""
    if not isinstance(method, str):
        return None
    return "gguf" if method.endswith(".gguf") else QUANTIZATIONS.get(method)


def _quantizers(config: EngineConfig) -> set[Any]:
    return {_quantizer(method) for method in config.quantized.values()}


# What the client does with its queue and its ranks.
_OF_THE_CLIENT = ("hang_timeout", "max_queue_len", "max_queue_seconds")


def _changed(config: EngineConfig, *names: str) -> list[str]:
    """Those of these fields that do not have their default."""
    return [f.name for f in dataclasses.fields(config) if f.name in names and getattr(config, f.name) != f.default]


def _hsdp_mismatch(config: EngineConfig) -> bool:
    parallel = config.parallel_config
    shards = parallel.hsdp_shard_size
    if not parallel.use_hsdp or shards == -1:
        return parallel.use_hsdp and parallel.num_weight_copies % parallel.hsdp_replicate_size != 0
    return shards * parallel.hsdp_replicate_size != parallel.num_weight_copies


RULES: tuple[Rule, ...] = (
    Rule(
        broken=lambda c: c.parallel_config.world_size > MAX_RANKS,
        message=f"all degrees together give more than {MAX_RANKS} ranks; lower data_parallel_size, "
        "pipeline_parallel_size, tensor_parallel_size, ulysses_degree or ring_degree.",
    ),
    Rule(
        broken=lambda c: c.distributed_executor_backend == "ray" and importlib.util.find_spec("ray") is None,
        message="distributed_executor_backend='ray' needs Ray, which is not installed; pip install 'denoised[ray]', "
        "or leave it at 'mp'.",
    ),
    Rule(
        broken=lambda c: c.distributed_executor_backend == "ray" and "TORCHELASTIC_RUN_ID" in os.environ,
        message="distributed_executor_backend='ray' cannot go with torchrun, which starts the ranks itself; leave it "
        "at 'mp', or run without torchrun.",
    ),
    Rule(
        broken=lambda c: "TORCHELASTIC_RUN_ID" in os.environ and bool(_changed(c, *_OF_THE_CLIENT)),
        message=f"{', '.join(_OF_THE_CLIENT)} act where one client starts the ranks and watches them, and not under "
        "torchrun, where every rank has its own; leave them out, or run without torchrun.",
    ),
    Rule(
        broken=lambda c: c.distributed_executor_backend == "ray" and not isinstance(c.model, str | Path),
        message="distributed_executor_backend='ray' takes a model that every node can read, not a pipeline object; "
        "save it into a folder and give that.",
    ),
    Rule(
        broken=lambda c: (
            c.parallel_config.ulysses_mode != "strict"
            and c.parallel_config.ulysses_degree * c.parallel_config.ring_degree == 1
        ),
        message="ulysses_mode='advanced_uaa' needs a ulysses_degree or ring_degree of 2 or more; raise one, or leave "
        "the mode out.",
    ),
    _over_ranks("vae_patch_parallel_size"),
    _over_ranks("text_encoder_tp_size"),
    Rule(
        broken=lambda c: (
            c.parallel_config.enable_expert_parallel
            and c.parallel_config.sequence_degree * c.parallel_config.tensor_parallel_size == 1
        ),
        message="enable_expert_parallel=True deals experts to the ranks of the tensor and sequence axes; raise "
        "tensor_parallel_size, ulysses_degree or ring_degree, or leave it off.",
    ),
    Rule(
        broken=lambda c: (
            c.parallel_config.enable_expert_parallel
            and c.parallel_config.use_hsdp
            and c.parallel_config.sequence_degree > 1
        ),
        message="enable_expert_parallel=True leaves the ranks of ulysses_degree and ring_degree with unequal weights, "
        "which use_hsdp=True cannot shard over them; use tensor_parallel_size with it, or leave one out.",
    ),
    Rule(
        broken=lambda c: c.parallel_config.use_hsdp and c.parallel_config.text_encoder_tp_size > 1,
        message="text_encoder_tp_size cannot go with use_hsdp=True, which shards the text encoders already; leave one "
        "out.",
    ),
    Rule(
        broken=lambda c: c.parallel_config.use_hsdp and c.parallel_config.num_weight_copies == 1,
        message="use_hsdp=True needs ranks that hold equal weights; raise cfg_parallel_size, ulysses_degree or "
        "ring_degree.",
    ),
    Rule(
        broken=lambda c: (
            not c.parallel_config.use_hsdp
            and (c.parallel_config.hsdp_shard_size, c.parallel_config.hsdp_replicate_size) != (-1, 1)
        ),
        message="hsdp_shard_size and hsdp_replicate_size act with use_hsdp=True only; set it, or leave them out.",
    ),
    Rule(
        broken=_hsdp_mismatch,
        message="hsdp_shard_size x hsdp_replicate_size must be the ranks that hold equal weights "
        "(cfg_parallel_size x ring_degree x ulysses_degree); leave hsdp_shard_size at -1, or make them agree.",
    ),
    Rule(
        broken=lambda c: bool(c.cache_config) and not c.caches,
        message="cache_config acts with a cache_backend only; set cache_backend, or leave it out.",
    ),
    Rule(
        broken=lambda c: c.quality is not None and (c.cache_backend is not None or bool(c.cache_config)),
        message="quality chooses cache_backend and cache_config itself; leave these out, or quality.",
    ),
    Rule(
        broken=lambda c: (
            c.caches
            and c.parallel_config.pipeline_parallel_size > 1
            and c.parallel_config.use_hsdp
            and c.parallel_config.cfg_parallel_size > 1
        ),
        message="cache_backend and quality cannot go with pipeline_parallel_size, use_hsdp=True and cfg_parallel_size "
        "all together: stages would gather weights for rows that skip different blocks; leave out one of the three.",
    ),
    Rule(
        broken=lambda c: c.cache_backend == "calibration" and c.parallel_config.pipeline_parallel_size > 1,
        message="pipeline_parallel_size cannot go with calibration, which looks at what all blocks add together; "
        "calibrate with tensor_parallel_size, ulysses_degree or ring_degree, and serve with stages.",
    ),
    Rule(
        broken=lambda c: c.quantization is not None and (None in _quantizers(c) or not c.quantized),
        message=f"quantization must be one of {', '.join(QUANTIZATIONS)}, the path of a .gguf file, or "
        "{'component': one of these}; leave it out for weights as they are.",
    ),
    Rule(
        broken=lambda c: any(importlib.util.find_spec(package) is None for package in _quantizers(c)),
        message="quantization needs torchao (fp8, int8, int8_weight_only) or gguf, which is not installed; pip "
        "install 'denoised[quantization]', or leave it out.",
    ),
    Rule(
        broken=lambda c: not isinstance(c.model, str | Path) and "gguf" in _quantizers(c),
        message="quantization='gguf' takes weights from a file in place of a folder's, and a pipeline object has its "
        "own; give the folder, or use 'int8'.",
    ),
    Rule(
        broken=lambda c: bool(c.quantized) and c.parallel_config.use_hsdp,
        message="quantization cannot go with use_hsdp=True, which shards plain weights only; use tensor_parallel_size "
        "or pipeline_parallel_size with it, or leave one out.",
    ),
    Rule(
        broken=lambda c: c.enable_cpu_offload and c.enable_layerwise_offload,
        message="enable_cpu_offload moves whole components and enable_layerwise_offload their blocks; choose one of "
        "them: blocks need less memory, components less time.",
    ),
    Rule(
        broken=lambda c: c.parallel_config.use_hsdp and (c.enable_cpu_offload or c.enable_layerwise_offload),
        message="use_hsdp=True shards weights over ranks and gathers them in each forward, so they cannot be away "
        "too; leave it off with enable_cpu_offload and enable_layerwise_offload, or raise tensor_parallel_size.",
    ),
    Rule(
        broken=lambda c: c.layerwise_num_gpu_layers != 1 and not c.enable_layerwise_offload,
        message="layerwise_num_gpu_layers acts with enable_layerwise_offload=True only; set it, or leave it out.",
    ),
    Rule(
        broken=lambda c: bool(c.compile_shapes) and c.enforce_eager is True,
        message="compile_shapes cannot go with enforce_eager=True, which compiles nothing; leave one out.",
    ),
    Rule(
        broken=lambda c: any(not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", size) for size in c.compile_shapes),
        message="compile_shapes takes width x height, and frames of a video, such as 1024x768 or 832x480x81.",
    ),
    Rule(
        broken=lambda c: c.lora_path is not None and (c.enforce_eager is False or bool(c.compile_shapes)),
        message="enforce_eager=False and compile_shapes cannot go with lora_path: blocks with an adapter run as they "
        "are written, so nothing would be compiled; leave one out, or fuse the adapter into the weights.",
    ),
    Rule(
        broken=lambda c: c.lora_scale != 1.0 and c.lora_path is None,
        message="lora_scale acts with lora_path only; give that, or leave it out.",
    ),
    Rule(
        broken=lambda c: c.num_weight_load_threads is not None and c.enable_multithread_weight_load is False,
        message="num_weight_load_threads cannot go with enable_multithread_weight_load=False; leave one out.",
    ),
    Rule(
        broken=lambda c: (
            not isinstance(c.model, str | Path) and bool(c.num_weight_load_threads or c.enable_multithread_weight_load)
        ),
        message="num_weight_load_threads and enable_multithread_weight_load act on files, and a pipeline object has "
        "none to read; leave them out.",
    ),
)


def validate(config: EngineConfig, *, num_devices: int | None = None) -> None:
    """Refuse settings that cannot act, before anything is loaded.

    Args:
        num_devices: accelerators on this node; None on CPU, where ranks share the cores.

    Raises:
        InvalidConfigError: one sentence with the field, the value and the way out.
    """
    for rule in RULES:
        if rule.broken(config):
            raise InvalidConfigError(rule.message)
    if num_devices is not None and config.parallel_config.world_size > num_devices:
        raise InvalidConfigError(
            f"{config.parallel_config.formula()} ranks need as many devices, and {num_devices} are here; "
            "lower a degree or set CUDA_VISIBLE_DEVICES."
        )
