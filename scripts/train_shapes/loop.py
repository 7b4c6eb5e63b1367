"""What every training stage shares: a resumable checkpoint, a log of JSON lines, a learning rate schedule."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Checkpoint:
    """Named objects with `state_dict`, and a step, in one file that is only ever replaced whole."""

    def __init__(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.path = path
        self.parts = dict(parts)

    def load(self) -> int:
        """The step to go on from; 0 where nothing was saved."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        return saved["step"]

    def save(self, step: int) -> None:
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({**saved, "rng": torch.get_rng_state(), "step": step}, temporary)
        temporary.replace(self.path)


class Log:
    """Appends JSON lines and prints them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def write(self, **values: float) -> None:
        values["seconds"] = round(time.monotonic() - self.started, 1)
        line = json.dumps({name: round(value, 5) for name, value in values.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def cosine_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step down, the gradient cut to a norm of 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad()


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
