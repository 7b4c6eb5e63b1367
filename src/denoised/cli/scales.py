"""Guidance flags whose meaning depends on the model: they are put onto the sampling parameters once it is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

from denoised.checks import bounded, check_fields
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams
from denoised.runtime.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales as scripts name them."""

    cfg_scale: float | None = bounded(
        None,
        minimum=0,
        maximum=1000,
        help="classifier-free guidance, against the negative prompt or an empty one: true_cfg_scale where the model "
        "takes it, else guidance_scale",
    )
    guidance_scale_high: float | None = bounded(
        None,
        minimum=0,
        maximum=1000,
        help="guidance of the high-noise expert; --guidance-scale is then that of the low-noise one",
    )

    def __post_init__(self) -> None:
        check_fields(self, InvalidRequestError)

    def onto(self, params: OmniDiffusionSamplingParams, info: ModelInfo) -> OmniDiffusionSamplingParams:
        """The parameters with these scales under the names that the loaded model has for them.

        Raises:
            InvalidRequestError: the model has no such scale, or it is given twice.
        """
        if self.guidance_scale_high is not None:
            params = self._two_experts(self.guidance_scale_high, params, info)
        if self.cfg_scale is not None:
            params = self._guided(self.cfg_scale, params, info)
        return params

    def _guided(
        self, scale: float, params: OmniDiffusionSamplingParams, info: ModelInfo
    ) -> OmniDiffusionSamplingParams:
        if "true_cfg_scale" in info.parameters:
            self._refuse_second(params.true_cfg_scale, "true_cfg_scale", info)
            return replace(params, true_cfg_scale=scale)
        self._refuse_second(params.guidance_scale, "guidance_scale", info)
        return replace(params, guidance_scale=scale)

    def _refuse_second(self, other: float | None, name: str, info: ModelInfo) -> None:
        if other not in (None, self.cfg_scale):
            raise InvalidRequestError(
                f"cfg_scale={self.cfg_scale} and {name}={other} are one scale of {info.pipeline}; give one of them."
            )

    def _two_experts(
        self, high: float, params: OmniDiffusionSamplingParams, info: ModelInfo
    ) -> OmniDiffusionSamplingParams:
        """diffusers calls the high-noise scale guidance_scale and the low-noise one guidance_scale_2."""
        if "guidance_scale_2" not in info.parameters:
            raise InvalidRequestError(
                f"guidance_scale_high={high}: {info.pipeline} has no second expert; use guidance_scale."
            )
        if params.guidance_scale is None or params.guidance_scale_2 is not None:
            raise InvalidRequestError(
                f"guidance_scale_high={high} needs guidance_scale, for the low-noise expert, and no guidance_scale_2."
            )
        return replace(params, guidance_scale=high, guidance_scale_2=params.guidance_scale)
