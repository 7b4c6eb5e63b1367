"""A pipeline without weights: every module is built on the meta device from its configuration file alone."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from denoised import hf
from denoised.errors import DenoisedError, ModelError, one_line
from denoised.runtime.load import BUILTIN

STATEFUL = ("scheduler_config.json", "guider_config.json")  # what needs no weights
# On a component without weights: what its configuration says of weights that come quantized.
CAME = "denoised_quantization_config"
CONFIGS = ("model_index.json", "*/config.json", *(f"*/{name}" for name in STATEFUL))


class _Absent:
    """A processor or tokenizer without files: some pipelines ask theirs for settings and ids when they are made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()

    def __call__(self, *_: Any, **__: Any) -> int:
        return 0


def skeleton(model: str) -> Any:
    """The pipeline of a built-in name, a folder or a hub id, with weights that have a shape and no values.

    Raises:
        ModelError: no such model, or a configuration that its classes do not take.
    """
    folder = folder_of(model)
    index = _json(folder / "model_index.json")
    pipeline_class = _class("diffusers", index.get("_class_name"), folder)
    listed = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    settings = {k: v for k, v in index.items() if not k.startswith("_") and k not in listed}
    with hf.quietly(bars=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {name: _component(folder / name, *value) for name, value in listed.items()}
        return _assembled(pipeline_class, parts | settings)


def _assembled(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    parameters = inspect.signature(pipeline_class.__init__).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and name != "self"]
    parts = dict.fromkeys(required) | {name: value for name, value in parts.items() if name in parameters}
    try:
        return pipeline_class(**parts)
    except AttributeError:
        pass  # it reads from a tokenizer or a processor while it is made
    try:
        return pipeline_class(**{name: part or _Absent() for name, part in parts.items()})
    except Exception as error:
        raise ModelError(f"{pipeline_class.__name__} cannot be built: {one_line(error)}") from error


def folder_of(model: str) -> Path:
    """Where the configuration files are; those of a hub id are fetched, and no weights."""
    path = BUILTIN.get(model, Path(model).expanduser())
    if not path.is_dir() and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        path = _fetched(model)
    if not (path / "model_index.json").is_file():
        raise ModelError(f"model={model!r} has no model_index.json; give a folder in diffusers layout or a hub id.")
    return path


def _fetched(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(CONFIGS)))
    except Exception as error:
        raise ModelError(
            f"model={model!r} is no folder, and its configuration cannot be fetched: {one_line(error)}"
        ) from error


def _component(folder: Path, library: str | None, name: str | None) -> Any:
    """A module on the meta device, a scheduler, or a stand-in for what has no weights."""
    if library is None or name is None:
        return None
    try:
        return _built(folder, _class(library, name, folder))
    except DenoisedError:
        raise
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} does not fit {name}: {one_line(error)}") from error


def _built(folder: Path, cls: Any) -> Any:
    import torch

    for name in STATEFUL:
        if (folder / name).is_file():
            return cls.from_config(_json(folder / name))
    if not issubclass(cls, torch.nn.Module):
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder.parent} lacks {folder.name}/config.json, the component that its index names.")
    config = _json(folder / "config.json")
    with torch.device("meta"):
        own = hasattr(cls, "from_config")
        made = cls.from_config(config) if own else cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    if config.get("quantization_config"):
        vars(made)[CAME] = config["quantization_config"]
    return made


def _class(library: str, name: Any, folder: Path) -> Any:
    """A class by the words of model_index.json. Nothing is imported that a model names: only known libraries, and
    modules that plugins imported already."""
    import diffusers
    import transformers

    homes = [diffusers, transformers, getattr(diffusers.pipelines, library, None), sys.modules.get(library)]
    found = next((getattr(home, name) for home in homes if home is not None and hasattr(home, str(name))), None)
    own = {cls.__name__: cls for cls in hf.subclasses(diffusers.DiffusionPipeline)}
    if found is None and name not in own:
        raise ModelError(
            f"{folder} needs {name} of {library}, which diffusers {diffusers.__version__} and transformers "
            f"{transformers.__version__} do not have; name the module that defines it in plugins."
        )
    return found or own[name]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable JSON ({one_line(error)}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return value
