"""GGUF files for tests: made of a tiny checkpoint's transformer, under diffusers' names or those of its authors.

The gguf package quantizes to the plain kinds; of the K kinds it knows what blocks mean, but makes none. So blocks of
these are drawn at random, with scales that keep the weights small, and what the package says that they mean is the
reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

Kind = gguf.GGMLQuantizationType
K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
# Where in a block of a K kind its scales in float16 are: bytes.
_SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def blocks(weight: np.ndarray, kind: Any, seed: int = 0) -> np.ndarray:
    """A matrix as bytes; of the K kinds random ones of its shape."""
    if kind not in K_KINDS:
        return gguf.quants.quantize(weight, kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    made = draw.integers(0, 256, (weight.size // values, size), dtype=np.uint8)
    for place in _SCALES[kind]:
        scale = draw.uniform(1e-5, 3e-5, len(made)).astype(np.float16)
        made[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return made.reshape(weight.shape[0], -1)


def fits(name: str, weight: Tensor, kind: Any) -> bool:
    """As the tools that write such files have it: matrices, of whole blocks a row."""
    return weight.ndim == 2 and weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 and "norm" not in name


def write(
    folder: Path,
    file: Path,
    kind: Any,
    *,
    component: str = "transformer",
    named: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    rest: Any = None,
) -> dict[str, Tensor]:
    """Write a component's weights; gives what they are by the gguf package, under the names of the file.

    rest: the kind of matrices that `kind` does not fit, else they are float32.
    """
    state = safetensors.torch.load_file(next((folder / component).glob("*.safetensors")))
    writer, meant = gguf.GGUFWriter(file, "test"), {}
    for name, weight in named(state).items():
        chosen = next((k for k in (kind, rest) if k is not None and fits(name, weight, k)), Kind.F32)
        data = weight.float().contiguous().numpy()
        if chosen != Kind.F32:
            data = blocks(data, chosen, seed=len(meant))
            writer.add_tensor(name, data, raw_dtype=chosen)
        else:
            data = data.squeeze() if data.ndim > 4 else data
            writer.add_tensor(name, data)
        plain = data if chosen == Kind.F32 else gguf.quants.dequantize(data, chosen)
        meant[name] = torch.from_numpy(plain.copy()).view(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


Names = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def pair(source: Path, root: Path, kind: Any, *, back: Names = dict, **options: Any) -> tuple[Path, Path]:
    """Two copies of a checkpoint: one with a GGUF file in place of the transformer's weights, and one with the weights
    that are in that file, for the plain pipeline.

    back: from the names of the file to diffusers'.
    """
    packed, plain = root / "packed", root / "plain"
    shutil.copytree(source, packed)
    shutil.copytree(source, plain)
    component = options.get("component", "transformer")
    meant = write(source, packed / component / "model.gguf", kind, **options)
    for file in (packed / component).glob("*.safetensors*"):
        file.unlink()
    state = next((plain / component).glob("*.safetensors"))
    whole = {name: tensor.contiguous().clone() for name, tensor in back(meant).items()}
    safetensors.torch.save_file(whole, state, metadata={"format": "pt"})
    return packed, plain


def z_image_of_its_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, other names for some layers."""
    found = dict(state)
    for name in [name for name in state if name.endswith("attention.to_q.weight")]:
        stem = name.removesuffix("to_q.weight")
        parts = [found.pop(f"{stem}{part}.weight") for part in ("to_q", "to_k", "to_v")]
        found[f"{stem}qkv.weight"] = torch.cat(parts)
    return {_renamed(name, _Z_IMAGE): tensor for name, tensor in found.items()}


_Z_IMAGE = (
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_k", "attention.k_norm"),
    ("attention.norm_q", "attention.q_norm"),
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def z_image_back(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {_renamed(name, tuple((theirs, ours) for ours, theirs in _Z_IMAGE)): t for name, t in state.items()}
    for name in [name for name in found if name.endswith("attention.qkv.weight")]:
        for part, tensor in zip(("to_q", "to_k", "to_v"), found.pop(name).chunk(3), strict=True):
            found[name.replace("qkv", part)] = tensor
    return found
