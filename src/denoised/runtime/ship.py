"""The model as ranks find it: in other processes, and on other nodes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from denoised.config import EngineConfig
from denoised.runtime import gguf_choice, load
from denoised.runtime.torchrun import torchrun_rank


def for_ranks(config: EngineConfig) -> tuple[EngineConfig, str | None]:
    """`config` with a model that ranks can load, and the folder that was made for it, if any.

    A pipeline object reaches ranks in other processes as a folder. A relative folder becomes absolute for nodes that
    have another working directory; `~` stays, since each node has its own.

    Raises:
        ModelError: the folder is missing or damaged.
    """
    if isinstance(config.model, str | Path):
        # A damaged folder is told before any rank starts, as is a file that is not there.
        found = load.locate(str(config.model), elsewhere=gguf_choice.files(config))
        if config.distributed_executor_backend == "ray" and isinstance(found, Path):
            return dataclasses.replace(config, model=_anywhere(str(config.model))), None
        return config, None
    if config.parallel_config.world_size == 1 or torchrun_rank() is not None:
        return config, None
    scratch = tempfile.mkdtemp(prefix="denoised-model-")
    config.model.save_pretrained(scratch)
    return dataclasses.replace(config, model=scratch), scratch


def _anywhere(model: str) -> str:
    return model if model in load.BUILTIN or model.startswith("~") else str(Path(model).absolute())
