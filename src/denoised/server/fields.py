"""The fields that all routes share. Sampling parameters are read off `OmniDiffusionSamplingParams`: names, types,
bounds and help are declared there alone.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

from denoised.lora_request import MAX_SCALE
from denoised.request import OmniDiffusionSamplingParams

# Objects of Python that no body can hold, and features that are not there; complaints.py says what to do instead.
_NOT_OVER_HTTP = frozenset(
    "generator latents pil_image output_type return_trajectory_latents lora_request "
    "enable_frame_interpolation frame_interpolation_exp frame_interpolation_scale "
    "frame_interpolation_model_path".split()
)
SAMPLING = tuple(f for f in fields(OmniDiffusionSamplingParams) if f.name not in _NOT_OVER_HTTP)
# Seconds that a request may wait and run, if it says so itself.
LONGEST_TIMEOUT = 86_400


class Closed(BaseModel):
    """Unknown fields are refused, and nothing is converted: what the schema says is what is taken."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _sampling_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(OmniDiffusionSamplingParams)
    return {f.name: _field(hints[f.name], f.metadata, f.default_factory is not MISSING) for f in SAMPLING}


def _field(hint: Any, metadata: Any, is_dict: bool) -> Any:
    """A field that says nothing unless it is given. Numbers of schedules are bounded by being finite."""
    if is_dict:
        return dict[str, Any] | None, Field(None, description=metadata["help"])
    low, high = metadata["minimum"], metadata["maximum"]
    if typing.get_origin(_only(hint)) is list:
        return list[float] | None, Field(None, description=metadata["help"], min_length=1)
    bounds: Any = Annotated[_only(hint), Field(ge=low, le=high)]
    return bounds | None, Field(None, description=metadata["help"])


def _only(hint: Any) -> Any:
    """`int` of `int | None`."""
    return next((part for part in typing.get_args(hint) if part is not type(None)), hint) if _is_union(hint) else hint


def _is_union(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


if TYPE_CHECKING:

    class SamplingFields(Closed):
        num_outputs_per_prompt: int | None = None
        num_frames: int | None = None
        height: int | None = None
        width: int | None = None
        fps: float | None = None
        extra_args: dict[str, Any] | None = None
else:
    SamplingFields = create_model("SamplingFields", __base__=Closed, **_sampling_fields())


class LoraFields(Closed):
    """An adapter of one request: the name of a loaded one, or a path below a folder that the server allows."""

    lora_name: str | None = Field(None, validation_alias=AliasChoices("lora_name", "name"), max_length=200)
    lora_path: str | None = Field(
        None, validation_alias=AliasChoices("lora_path", "local_path", "path"), max_length=4096
    )
    scale: float | None = Field(None, ge=-MAX_SCALE, le=MAX_SCALE, description="strength; default 1")
    component: str | None = Field(None, description="the denoiser it is for, such as transformer_2", max_length=200)
    lora_int_id: int | None = Field(
        None,
        validation_alias=AliasChoices("lora_int_id", "int_id"),
        description="taken for vLLM's callers; adapters are told apart by their files",
    )

    @model_validator(mode="after")
    def _names_one(self) -> LoraFields:
        if not (self.lora_name or self.lora_path):
            raise ValueError("lora_name is missing; give it, or a lora_path")
        return self

    def plain(self) -> dict[str, Any]:
        """As the sampling parameter `lora_request` takes it."""
        return {k: v for k, v in self.model_dump().items() if v is not None and k != "lora_int_id"}


Loras = LoraFields | Annotated[str, Field(min_length=1, max_length=200)]


class RequestFields(SamplingFields):
    """What every request for media may say. The rest of its fields are the route's own."""

    model: str | None = Field(None, description="the served model or a loaded adapter, as /v1/models names it")
    lora_request: Loras | Annotated[list[Loras], Field(min_length=1, max_length=8)] | None = Field(
        None, description="adapters: names of loaded ones, or objects"
    )
    lora: Loras | Annotated[list[Loras], Field(min_length=1, max_length=8)] | None = Field(
        None, description="the same as lora_request"
    )
    negative_prompt: str | None = Field(None, description="what to keep out")
    timeout: float | None = Field(
        None, gt=0, le=LONGEST_TIMEOUT, description="seconds from now after which the request fails with 504"
    )
    priority: int | None = Field(
        None, ge=-100, le=100, description="the higher goes first; at most what the server's max_priority allows"
    )

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given."""
        return {f.name: value for f in SAMPLING if (value := getattr(self, f.name)) is not None}
