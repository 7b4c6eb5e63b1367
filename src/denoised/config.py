"""What the engine is started with: frozen dataclasses. What may go together is in `rules.py`.

Nothing here imports torch: the command line and the server read these before a model is loaded.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.errors import InvalidConfigError, InvalidRequestError
from denoised.lora_request import MAX_SCALE
from denoised.request import OmniDiffusionSamplingParams

# More than any machine has: a product of degrees beyond it is a slip, and nobody should start so many processes.
MAX_RANKS = 4096
# Methods of quantization, by the package that has them.
QUANTIZATIONS = {"fp8": "torchao", "int8": "torchao", "int8_weight_only": "torchao", "gguf": "gguf"}
# Names of qualities: the SSIM of the worst picture to the one without a cache.
QUALITIES = {"lossless": 1.0, "high": 0.98}


@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks, and what each axis of them does. World size is the product of the axes."""

    pipeline_parallel_size: int = bounded(1, minimum=1, help="stages the denoiser's blocks are cut into")
    data_parallel_size: int = bounded(1, minimum=1, help="replicas of the whole engine")
    tensor_parallel_size: int = bounded(1, minimum=1, help="ranks that share each weight matrix")
    enable_expert_parallel: bool = bounded(False, help="deal the experts of MoE blocks to ranks")
    sequence_parallel_size: int | None = bounded(None, minimum=1, help="ulysses_degree x ring_degree, if given")
    ulysses_degree: int = bounded(1, minimum=1, help="ranks that exchange heads for sequence shards")
    ring_degree: int = bounded(1, minimum=1, help="ranks that pass keys and values round a ring")
    ulysses_mode: str = bounded("strict", choices=("strict", "advanced_uaa"), help="uneven lengths and heads")
    cfg_parallel_size: int = bounded(
        1, minimum=1, maximum=64, help="ranks that guidance branches and requests are dealt to"
    )
    vae_patch_parallel_size: int = bounded(1, minimum=1, help="ranks that VAE tiles are dealt to")
    text_encoder_tp_size: int = bounded(1, minimum=1, help="ranks that share each text encoder matrix")
    use_hsdp: bool = bounded(False, help="shard weights per block, gathered as they are used")
    hsdp_shard_size: int = bounded(-1, minimum=-1, help="ranks that share one copy of the weights; -1: all")
    hsdp_replicate_size: int = bounded(1, minimum=1, help="copies of the sharded weights")

    def __post_init__(self) -> None:
        check_fields(self)
        sequence = self.ulysses_degree * self.ring_degree
        if self.sequence_parallel_size not in (None, sequence):
            raise InvalidConfigError(
                f"sequence_parallel_size={self.sequence_parallel_size} is not ulysses_degree x ring_degree = "
                f"{self.ulysses_degree} x {self.ring_degree} = {sequence}; leave it out or make them agree."
            )

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axis names and sizes, outermost first."""
        return {
            "data": self.data_parallel_size,
            "cfg": self.cfg_parallel_size,
            "pipeline": self.pipeline_parallel_size,
            "ring": self.ring_degree,
            "ulysses": self.ulysses_degree,
            "tensor": self.tensor_parallel_size,
        }

    @property
    def world_size(self) -> int:
        size = 1
        for axis in self.axes.values():
            size *= axis
        return size

    @property
    def ranks_per_replica(self) -> int:
        return self.world_size // self.data_parallel_size

    @property
    def sequence_degree(self) -> int:
        """Ranks that the sequence is spread over."""
        return self.ring_degree * self.ulysses_degree

    @property
    def num_weight_copies(self) -> int:
        """Ranks of a replica that hold equal denoiser weights, which weight sharding may spread out."""
        return self.cfg_parallel_size * self.ring_degree * self.ulysses_degree

    @property
    def is_entangled(self) -> bool:
        """Whether component calls hold collectives, so that a rank that fails in one leaves others waiting in it."""
        inside = (self.pipeline_parallel_size, self.ring_degree, self.ulysses_degree, self.tensor_parallel_size)
        return self.use_hsdp or max(*inside, self.vae_patch_parallel_size, self.text_encoder_tp_size) > 1

    @property
    def deals_components(self) -> bool:
        """Whether the places of the cfg axis can run different encoder and VAE calls at once: they hold no collective
        of ranks at several places."""
        per_place = self.ranks_per_replica // self.cfg_parallel_size
        inside = (self.vae_patch_parallel_size, self.text_encoder_tp_size)
        return self.cfg_parallel_size > 1 and not self.use_hsdp and not any(per_place % size for size in inside)

    def formula(self) -> str:
        """The world size as a product with its numbers, for error messages."""
        product = " x ".join(f"{name} {size}" for name, size in self.axes.items())
        return f"{product} = {self.world_size}"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything but the requests. `Omni(...)` takes these names as keywords."""

    model: Any = bounded("shapes", help="hub id, folder in diffusers layout, built-in name, or a DiffusionPipeline")
    parallel_config: DiffusionParallelConfig = bounded(DiffusionParallelConfig())
    distributed_executor_backend: str = bounded(
        "mp",
        choices=("mp", "ray"),
        help="who starts ranks: this machine (mp), or a Ray cluster of any nodes",
    )
    dtype: str | None = bounded(
        None, choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on GPU, float32 on CPU"
    )
    num_threads: int | None = bounded(
        None, minimum=1, maximum=1024, help="CPU threads of each rank; default: cores over ranks"
    )
    deterministic: bool = bounded(False, help="never join rows of different requests: bytes do not depend on load")
    plugins: tuple[str, ...] = bounded((), help="modules that every rank imports first: own pipelines and components")
    max_num_seqs: int = bounded(8, minimum=1, help="requests in flight at once; the rest wait")
    max_queue_len: int = bounded(256, minimum=1, help="requests that may wait; AsyncOmni refuses more")
    max_queue_seconds: float | None = bounded(None, minimum=0, help="predicted work that may wait; default: any")
    hang_timeout: float = bounded(
        60.0, minimum=1, help="seconds of silence after which ranks are started anew (or 20 predicted ticks)"
    )
    memory_limit_mb: int | None = bounded(
        None, minimum=1, help="memory of each rank for weights and requests; default: the device's, on CPU any"
    )
    encoder_cache_mb: int = bounded(256, minimum=0, help="memory for encoded prompts and images; 0: off")
    max_pixels: int = bounded(4096 * 4096, minimum=1, help="largest height x width of a request")
    max_prompt_chars: int = bounded(20_000, minimum=1, help="longest prompt of a request")
    boundary_ratio: float | None = bounded(None, minimum=0, maximum=1, help="where two-expert models switch")
    flow_shift: float | None = bounded(
        None, minimum=1e-3, maximum=1000, help="timestep shift of flow-matching schedulers"
    )
    vae_use_slicing: bool = bounded(False, help="decode one image of a batch at a time")
    vae_use_tiling: bool = bounded(False, help="decode in tiles")
    enforce_eager: bool | None = bounded(
        None, help="never compile blocks (False: compile them); default: compile on GPU, on CPU with compile_shapes"
    )
    compile_shapes: tuple[str, ...] = bounded(
        (), help="compile blocks at start for sizes as 1024x768 or 832x480x81 (frames); default: the model's own"
    )
    cache_backend: str | None = bounded(
        None, help="skip blocks of similar steps: tea_cache, cache_dit, mag_cache or first_block_cache"
    )
    cache_config: dict[str, Any] | None = bounded(None, help="settings of the cache backend, docs/caches.md")
    quality: Any = bounded(
        None, help='let the engine choose the cache: lossless, high, or {"ssim": 0.95} at least, docs/caches.md'
    )
    quantization: Any = bounded(
        None,
        help='weights in fewer bits: fp8, int8, int8_weight_only, gguf, a .gguf file, or {"component": method}, '
        "docs/quantization.md",
    )
    enable_cpu_offload: bool = bounded(
        False, help="keep components off the device while they wait; on CPU: in their files"
    )
    enable_layerwise_offload: bool = bounded(
        False, help="keep blocks off the device while they wait; on CPU: in their files"
    )
    layerwise_num_gpu_layers: int = bounded(1, minimum=1, help="blocks on the device, beside the one that is fetched")
    attention_backend: str | dict[str, str] | None = bounded(
        None, help="attention kernel of the denoisers, or of components by name (vae=flex,...), docs/speed.md"
    )
    lora_path: str | None = bounded(None, help="LoRA that is active from the start: safetensors, folder or hub id")
    lora_scale: float = bounded(1.0, minimum=-MAX_SCALE, maximum=MAX_SCALE, help="strength of that LoRA")
    max_loras: int = bounded(16, minimum=1, help="LoRAs of requests in memory; those unused for longest make room")
    max_lora_mb: int | None = bounded(None, minimum=1, help="memory for LoRAs of requests; default: any")
    num_weight_load_threads: int | None = bounded(
        None, minimum=1, maximum=256, help="threads that read weight files; default: 4 on GPU, on CPU files are mapped"
    )
    enable_multithread_weight_load: bool | None = bounded(
        None, help="read weight files side by side, before the first request"
    )
    default_sampling_params: dict[str, Any] = bounded({}, help="sampling parameters for requests that leave them out")

    @property
    def caches(self) -> bool:
        """Whether a cache is asked for."""
        return self.cache_backend not in (None, "none") or (self.least_ssim or 1.0) < 1

    @property
    def quantized(self) -> dict[str, Any]:
        """Component to method of quantization, or to a .gguf file; "" stands for the denoisers."""
        given = self.quantization
        if isinstance(given, str) and given.startswith("{"):  # from the command line
            with contextlib.suppress(ValueError):
                given = json.loads(given)
        return dict(given) if isinstance(given, dict) else {} if given is None else {"": given}

    @property
    def least_ssim(self) -> float | None:
        """What `quality` asks of the worst picture; 1: no cache; None: quality is not asked for."""
        return None if self.quality is None else _least_ssim(self.quality)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.quality is not None:
            _least_ssim(self.quality)
        try:
            OmniDiffusionSamplingParams().with_defaults(self.default_sampling_params)
        except InvalidRequestError as error:
            raise InvalidConfigError(f"default_sampling_params: {error}") from error


def _least_ssim(quality: Any) -> float:
    """A name, or {"ssim": number}; as JSON, which the command line gives, too. Raises InvalidConfigError."""
    if isinstance(quality, str) and quality in QUALITIES:
        return QUALITIES[quality]
    try:
        found = json.loads(quality) if isinstance(quality, str) else quality
        ((name, least),) = found.items()
    except (ValueError, AttributeError):
        name, least = "", None
    if name == "ssim" and isinstance(least, int | float) and not isinstance(least, bool) and 0 < least <= 1:
        return float(least)
    names = ", ".join(repr(known) for known in QUALITIES)
    raise InvalidConfigError(
        f"quality={quality!r:.80}: must be one of {names}, or {{'ssim': x}} with x above 0 and at most 1."
    )
