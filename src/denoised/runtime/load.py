"""From a model's name to a pipeline. Folders are checked file by file first, without torch, so that a damaged
checkpoint is one clear sentence before any rank starts. Weights are safetensors only; nothing is unpickled.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError, one_line
from denoised.runtime import gguf_choice

BUILTIN = {"shapes": Path(__file__).parent.parent / "models" / "shapes"}
# How the names of component classes end that have a configuration and no weights.
WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor", "Scheduler", "Guidance")
# Packages that some models' processors need, and our extras that bring them.
EXTRAS = {"torchvision": "vision"}
# Sampling parameters of built-in models, which were trained for one size.
BUILTIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes": {"height": 128, "width": 128, "num_inference_steps": 20, "true_cfg_scale": 4.0}
}


def locate(model: str, *, elsewhere: Collection[str] | None = None) -> str | Path:
    """The folder of a built-in or local model, or the hub id as it is.

    Args:
        elsewhere: components whose weights are not looked for in their folders; None: of none they are.

    Raises:
        ModelError: no such folder, or a folder that is damaged.
    """
    if model in BUILTIN:
        return _checked(BUILTIN[model], elsewhere)
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path, elsewhere)
    if path.exists():
        raise ModelError(f"model={model!r} is a file; give the folder that holds model_index.json.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        known = ", ".join(BUILTIN)
        raise ModelError(
            f"model={model!r} is no folder, no hub id of the form owner/name, and not built in ({known})."
        )
    return model


def _checked(folder: Path, elsewhere: Collection[str] | None) -> Path:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has no model_index.json; give a folder in diffusers layout.")
    for name, value in _read_json(index).items():
        # A component is [library, class]; other lists are settings.
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            looked_for = elsewhere is not None and name not in elsewhere
            _check_component(folder / name, class_name=value[1], looked_for=looked_for)
    return folder


def _check_component(folder: Path, class_name: str, *, looked_for: bool) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder.parent} lacks the component {folder.name!r} that its model_index.json names.")
    for index in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(_read_json(index).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard} is missing, though {index.name} names it; download it again.")
    files = list(folder.glob("*.safetensors"))
    if looked_for and not files and (folder / "config.json").is_file() and not class_name.endswith(WITHOUT_WEIGHTS):
        gguf = next(itertools.chain(folder.glob("*.gguf"), folder.parent.glob("*.gguf")), None)
        way = "download or convert them" if gguf is None else f"{gguf.name} is read with quantization='gguf'"
        raise ModelError(f"{folder} holds no weights in safetensors, and no others are read; {way}.")
    for file in files:
        read_header(file)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable JSON ({one_line(error)}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; download it again.")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """Names, shapes and offsets of a safetensors file, without its tensors.

    Raises:
        ModelError: the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        raw = file.read(min(length, size))
    try:
        header = json.loads(raw)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no safetensors file, or is truncated; download it again.") from error
    if 8 + length + end != size:
        raise ModelError(f"{path} has {size} bytes instead of {8 + length + end}: it is truncated; download it again.")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


# Threads that read weights where a copy has to be made of them.
LOAD_THREADS = 4


def num_load_threads(config: EngineConfig, device: str) -> int:
    """Threads that read weights before the first request; 0: one by one, and on the CPU files are mapped, and read
    when a forward gets there."""
    if config.enable_multithread_weight_load is False:
        return 0
    asked = config.enable_multithread_weight_load or device != "cpu"
    return config.num_weight_load_threads or (LOAD_THREADS if asked else 0)


def reads_late(config: EngineConfig, device: str) -> bool:
    """Whether one rank leaves weights in their files at first: to read them side by side, or as they are needed."""
    offload = config.enable_cpu_offload or config.enable_layerwise_offload
    return offload or bool(config.quantized) or num_load_threads(config, device) > 0


def default_sampling_params(model: Any) -> dict[str, Any]:
    """Sampling parameters that a built-in model was trained for."""
    return BUILTIN_DEFAULTS.get(model, {}) if isinstance(model, str) else {}


def load(config: EngineConfig, *, device: str, unread: bool = False) -> Any:
    """The pipeline of `config.model` on `device`, ready to run.

    Args:
        unread: leave the weights in their files until `weights.fill`; those of a pipeline object stay as they are.

    Raises:
        ModelError: it cannot be loaded, with the reason in one sentence.
    """
    import torch

    from denoised.runtime import weights

    if not isinstance(config.model, str | Path):
        if config.dtype is not None:
            raise ModelError(f"dtype={config.dtype!r}: a pipeline object keeps its own; convert it with .to() first.")
        return _configured(config.model.to(device), config)
    packed = gguf_choice.files(config)
    source, dtype = locate(str(config.model), elsewhere=packed), getattr(torch, dtype_name(config, device))
    try:
        given = _packed(source, packed, dtype, device)
        with (
            hf.quietly(bars=not isinstance(source, Path)),
            hf.giving_components(given),
            weights.unread(device) if unread else nullcontext(),
        ):
            pipeline = _pipeline_class(source).from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=isinstance(source, Path),
            )
    except (ModelError, InvalidConfigError):
        raise
    except Exception as error:
        raise ModelError(
            f"model {str(config.model)!r} cannot be loaded: {_misfit(config, packed) or _why(error)}"
        ) from error
    if isinstance(source, Path):
        _check_complete(pipeline, source, without=packed)
    return _configured(pipeline.to(device), config)


def _why(error: Exception) -> str:
    """The reason in a line; of a package that is not here, how to get it."""
    words = str(error).lower() if isinstance(error, ImportError) else ""
    found = next((package for package in EXTRAS if package in words), None)
    if found is None:
        return one_line(error)
    return f"its processors need {found}, which is not installed; pip install 'denoised[{EXTRAS[found]}]'."


def _misfit(config: EngineConfig, packed: Collection[str]) -> str | None:
    """The file and the weight, if a shape was the reason."""
    from denoised.runtime import misfits

    return misfits.first(str(config.model), without=packed)


def _packed(source: str | Path, files: Mapping[str, Path], dtype: Any, device: str) -> dict[str, Any]:
    """Components whose weights are in GGUF files."""
    if not files:
        return {}
    from denoised.runtime import gguf_files

    classes = hf.class_names(source)
    return {
        name: gguf_files.model(source, name, classes.get(name, ""), file, dtype, device)
        for name, file in files.items()
    }


def _pipeline_class(source: str | Path) -> Any:
    """diffusers' own loader, or the class of a plugin that a local model_index.json names."""
    import diffusers

    if isinstance(source, Path):
        name = _read_json(source / "model_index.json").get("_class_name")
        if isinstance(name, str) and not hasattr(diffusers, name):
            own = {cls.__name__: cls for cls in hf.subclasses(diffusers.DiffusionPipeline)}
            if name not in own:
                raise ModelError(
                    f"{source} is a {name}, which diffusers {diffusers.__version__} does not have; "
                    "name the module that defines it in plugins."
                )
            return own[name]
    return diffusers.DiffusionPipeline


def dtype_name(config: EngineConfig, device: str) -> str:
    """The dtype that weights are loaded in."""
    return config.dtype or ("float32" if device == "cpu" else "bfloat16")


def _check_complete(pipeline: Any, folder: Path, *, without: Collection[str]) -> None:
    """A denoiser or VAE weight that no file holds would be random: refuse it."""
    from diffusers import ModelMixin

    for name, component in pipeline.components.items():
        # Of what came quantized files hold the parts, and its loader sees to them.
        if isinstance(component, ModelMixin) and name not in without and not hf.is_quantized(component):
            found = {key for file in (folder / name).glob("*.safetensors") for key in read_header(file)}
            missing = [key for key in component.state_dict(keep_vars=True) if key not in found]
            if found and missing:
                raise ModelError(
                    f"{folder / name} lacks the weight {missing[0]} ({len(missing)} in all); download it again."
                )


def _configured(pipeline: Any, config: EngineConfig) -> Any:
    """Settings of the engine that pipelines read from themselves."""
    from denoised.runtime import vae_flags
    from denoised.runtime.model_info import branching_config
    from denoised.runtime.program import set_flow_shift

    pipeline.set_progress_bar_config(disable=True)
    if config.boundary_ratio is not None:
        _refuse_unless("boundary_ratio" in branching_config(pipeline), "boundary_ratio", pipeline)
        hf.set_config(pipeline, boundary_ratio=config.boundary_ratio)
    if config.flow_shift is not None:
        _refuse_unless("flow_shift" in branching_config(pipeline), "flow_shift", pipeline)
        set_flow_shift(pipeline.scheduler, config.flow_shift)
    vae_flags.apply(pipeline, config)
    return pipeline


def _refuse_unless(possible: bool, setting: str, pipeline: Any) -> None:
    if not possible:
        raise ModelError(f"{setting}: {type(pipeline).__name__} has no such setting; leave it out.")
