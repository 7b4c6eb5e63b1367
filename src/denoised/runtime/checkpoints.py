"""A request's state between two iterations, as plain data: to go on from after a crash, or in another process.

A checkpoint holds the request itself and its past (`steps/replay.py`). It belongs to one model: another would make
something else of it. Nothing of it is pickled: it is safetensors with JSON beside.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import safetensors.torch
import torch
from torch import nn

from denoised import hf
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams, Request, Service
from denoised.runtime import quantizing
from denoised.steps import parts
from denoised.steps.packing import Packed, UnpackableError, pack
from denoised.steps.replay import Past, Prediction, StepState

VERSION = 1
_NO_CHECKPOINT = "resume: these are no bytes of a checkpoint; give what Checkpoint.to_bytes() made."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`meta` is JSON: version, model, digest, seed and step, and where each of `tensors` belongs."""

    meta: dict[str, Any]
    tensors: list[torch.Tensor]

    @property
    def step(self) -> int:
        """Denoising iterations that are done."""
        return int(self.meta["step"])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        names = {str(number): tensor.cpu() for number, tensor in enumerate(self.tensors)}
        return safetensors.torch.save(names, metadata={"checkpoint": json.dumps(self.meta)})

    @staticmethod
    def from_bytes(raw: bytes) -> Checkpoint:
        """The inverse of `to_bytes`.

        Raises:
            InvalidRequestError: not a checkpoint, or one of another version.
        """
        try:
            names, meta = safetensors.torch.load(raw), json.loads(_metadata(raw)["checkpoint"])
            tensors = [names[str(number)] for number in range(len(names))]
        except Exception as error:  # whatever bytes can do to two parsers
            raise InvalidRequestError(_NO_CHECKPOINT) from error
        return Checkpoint(meta=meta, tensors=tensors)


def _metadata(raw: bytes) -> dict[str, str]:
    """The strings beside the tensors of a safetensors file."""
    length = struct.unpack("<Q", raw[:8])[0]
    found: dict[str, str] = json.loads(raw[8 : 8 + length])["__metadata__"]
    return found


class Saver:
    """Makes the checkpoints of one request.

    Raises:
        UnpackableError: an input of the request has no form in which it could be kept.
    """

    def __init__(self, request: Request, *, model: str, loras: Sequence[Any] = ()) -> None:
        self._request, self._model, self._digest = request, model, digest(request)
        self._loras = list(loras)

    def save(self, past: Past, remembered: Any = None) -> Checkpoint:
        """A checkpoint in CPU memory. `remembered`: what features keep of steps, as a tree that can be packed."""
        told = {"request": _told(self._request), "past": _plain(past)}
        packed = pack(told | ({} if remembered is None else {"remembered": remembered}), copy=False)
        meta = {
            "version": VERSION,
            "model": self._model,
            "digest": self._digest,
            "loras": self._loras,
            "seed": self._request.seed,
            "step": past.iteration,
            "skeleton": packed.skeleton,
        }
        return Checkpoint(meta=meta, tensors=[tensor.to("cpu", copy=True).contiguous() for tensor in packed.tensors])


def open_past(checkpoint: Any, request: Request, *, model: str, loras: Sequence[Any] = ()) -> Past:
    """The past that a checkpoint of this request holds. `loras`: content and scale of each adapter that acts.

    Raises:
        InvalidRequestError: it is of another model, or of other adapters, or of another request, or damaged.
    """
    found = _opened(checkpoint)
    meta = checkpoint.meta
    if meta["model"] != model:
        raise InvalidRequestError("resume: the checkpoint is of another model; load the model that it was made with.")
    if [list(each) for each in meta.get("loras", ())] != [list(each) for each in loras]:
        raise InvalidRequestError(
            "resume: the checkpoint was made with other adapters; give the same files and scales as lora_request and "
            "lora_path."
        )
    if meta["digest"] != digest(request):
        raise InvalidRequestError(
            "resume: the checkpoint is of another request; send the same prompt, parameters and seed, or leave it out."
        )
    try:
        return _past(found["past"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(_NO_CHECKPOINT) from error


def remembered(checkpoint: Any) -> Any:
    """What features kept of steps; None if nothing was. Raises as `open_past`, which says more."""
    return _opened(checkpoint).get("remembered")


def request_of(checkpoint: Any, request_id: str, service: Service) -> Request:
    """The request that a checkpoint is of, to go on from there.

    Raises:
        InvalidRequestError: no checkpoint, or one of another version.
    """
    found = _opened(checkpoint)
    try:
        told = dict(found["request"])
        params = OmniDiffusionSamplingParams(**told.pop("params"))
        return Request(request_id=request_id, params=params, service=service, resume=checkpoint, **told)
    except (KeyError, TypeError) as error:
        raise InvalidRequestError(_NO_CHECKPOINT) from error


def _opened(checkpoint: Any) -> Any:
    if not isinstance(checkpoint, Checkpoint):
        raise InvalidRequestError(f"resume={checkpoint!r:.40} is no checkpoint; give Saved.checkpoint.")
    try:
        if checkpoint.meta["version"] != VERSION:
            raise InvalidRequestError(
                f"resume: the checkpoint has version {checkpoint.meta['version']!r:.20} and this engine reads "
                f"{VERSION}; run the request from its start."
            )
        return Packed(skeleton=checkpoint.meta["skeleton"], tensors=checkpoint.tensors).unpack()
    except (KeyError, TypeError, UnpackableError) as error:
        raise InvalidRequestError(_NO_CHECKPOINT) from error


# ---- requests


def _told(request: Request) -> dict[str, Any]:
    """All of a request that decides its result."""
    params = {f.name: getattr(request.params, f.name) for f in fields(request.params)}
    state = request.generator_state
    return {"prompt": dict(request.prompt), "params": params, "seed": request.seed, "generator_state": state}


def digest(request: Request) -> str:
    """Equal for requests with equal results, but for their adapters, which are told apart by their content.

    Raises:
        UnpackableError: an input has no form in which it could be told from others.
    """
    told = _told(request)
    packed = pack(told | {"params": {**told["params"], "lora_request": None}}, copy=False)
    found = hashlib.blake2b(json.dumps(packed.skeleton).encode(), digest_size=16)
    for tensor in packed.tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- the past


def _plain(past: Past) -> dict[str, Any]:
    """Dataclasses as dicts; predictions of one kind once."""
    kinds: dict[str, int] = {}
    numbers = [kinds.setdefault(json.dumps(_kind(p)), len(kinds)) for p in past.predictions]
    return {
        "iteration": past.iteration,
        "num_steps": past.num_steps,
        "kinds": list(kinds),
        "predictions": numbers,
        "results": dict(past.results),
        "states": {number: _plain_state(state) for number, state in past.states.items()},
    }


def _kind(prediction: Prediction) -> list[Any]:
    shapes = [[list(shape), str(dtype).removeprefix("torch."), on] for shape, dtype, on in prediction.shapes]
    return [prediction.name, prediction.branch, prediction.writes, prediction.skeleton, shapes]


def _prediction(kind: str) -> Prediction:
    name, branch, writes, skeleton, shapes = json.loads(kind)
    shaped = tuple((tuple(shape), getattr(torch, dtype), on) for shape, dtype, on in shapes)
    return Prediction(name=name, branch=branch, writes=writes, skeleton=skeleton, shapes=shaped)


def _plain_state(state: StepState) -> dict[str, Any]:
    scheduler = {name: [json.dumps(p.skeleton), p.tensors] for name, p in state.scheduler.items()}
    return {"scheduler": scheduler, "generators": state.generators, "random": state.random}


def _state(plain: dict[str, Any]) -> StepState:
    scheduler = {
        name: Packed(skeleton=json.loads(text), tensors=ts) for name, (text, ts) in plain["scheduler"].items()
    }
    return StepState(scheduler=scheduler, generators=plain["generators"], random=plain["random"])


def _past(plain: dict[str, Any]) -> Past:
    kinds = [_prediction(kind) for kind in plain["kinds"]]
    return Past(
        iteration=plain["iteration"],
        num_steps=plain["num_steps"],
        predictions=[kinds[number] for number in plain["predictions"]],
        results=plain["results"],
        states={number: _state(state) for number, state in plain["states"].items()},
    )


# ---- the model

# How many weights of a component are looked at, and values of each: fine-tuned models differ in nearly all.
_WEIGHTS, _SAMPLES = 16, 8


def fingerprint(pipeline: Any) -> str:
    """Equal for the same pipeline with the same weights."""
    return to_fingerprint(pipeline)()


def to_fingerprint(pipeline: Any) -> Callable[[], str]:
    """Notes of what to take it, before features cut the weights; calling it reads those, after all that may refuse."""
    known, few = [type(pipeline).__name__], []
    for name, part in sorted(hf.components(pipeline).items()):
        known.append(f"{name} {type(part).__name__} {_config_of(part)}")
        if isinstance(part, nn.Module):
            weights = part.state_dict()
            known.append(repr([(label, tuple(t.shape), t.dtype) for label, t in weights.items()]))
            few += [_sample(tensor) for tensor in list(weights.values())[:: max(1, len(weights) // _WEIGHTS)]]

    def read() -> str:
        found = hashlib.blake2b(repr(known + quantizing.methods(pipeline)).encode(), digest_size=16)
        for tensor in few:
            # A copy into a plain tensor reads one that is still in its file.
            found.update(torch.zeros(tensor.shape).copy_(tensor).numpy().tobytes())
        return found.hexdigest()

    return read


def _config_of(part: Any) -> str:
    """Without the private entries, such as the folder that it was loaded from."""
    config = getattr(part, "config", None)
    items = config.items() if isinstance(config, dict) else ()
    return repr(sorted((key, repr(value)) for key, value in items if not key.startswith("_")))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    few = parts.parts(tensor)[0].detach()
    while few.dim() > 1:  # not `flatten`: of a weight that is in a file only this much is read
        few = few[0] if few.shape[0] else few.new_empty(0)
    return few[:_SAMPLES] if few.dim() == 1 else few
