"""Which file of a model holds a weight of another shape than its configuration says: asked when loading has failed,
for the libraries name the weight at best."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import nn

from denoised import hf
from denoised.runtime.load import read_header
from denoised.runtime.planning.skeleton import CAME, folder_of, skeleton

Shape = list[int]


def first(model: str, *, without: Collection[str]) -> str | None:
    """One sentence about the first; None: there is none, or it cannot be told.

    Args:
        without: components whose weights are not in their folders.
    """
    try:
        return next(_all(folder_of(model), hf.components(skeleton(model)), without), None)
    except Exception:  # whatever stopped the loader may stop this too, and is told already
        return None


def _all(folder: Path, parts: Mapping[str, object], without: Collection[str]) -> Iterator[str]:
    for name, part in parts.items():
        # Of what came quantized files hold other tensors than the model has.
        if isinstance(part, nn.Module) and name not in without and CAME not in vars(part):
            wanted = {key: list(tensor.shape) for key, tensor in part.state_dict().items()}
            for file in sorted((folder / name).glob("*.safetensors")):
                yield from _of_file(file, wanted, type(part).__name__)


def _of_file(file: Path, wanted: dict[str, Shape], class_name: str) -> Iterator[str]:
    tails = _by_tail(wanted)
    for key, entry in read_header(file).items():
        shape = wanted.get(key) or next((tails[tail] for tail in _tails(key) if tails.get(tail)), entry["shape"])
        if shape != entry["shape"]:
            yield (
                f"{file}: {key} has shape {entry['shape']} instead of {shape}, which {class_name} has by its "
                "config.json; download both again."
            )


def _by_tail(wanted: dict[str, Shape]) -> dict[str, Shape | None]:
    """Shapes by the ends of names; None for an end that several have."""
    found: dict[str, Shape | None] = {}
    for key, shape in wanted.items():
        for tail in _tails(key):
            found[tail] = None if tail in found else shape
    return found


def _tails(key: str) -> Iterator[str]:
    """The ends of a name that tell a layer of a list, longest first: libraries rename what stands before."""
    parts = key.split(".")
    for start in range(len(parts)):
        if any(part.isdigit() for part in parts[start + 1 : -1]):
            yield ".".join(parts[start:])
