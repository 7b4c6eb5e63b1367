"""A pipeline that diffusers does not have, as a user would write it: two modalities, guidance by CFGParallelMixin.

Imported by ranks as a plugin. The transformer returns a tuple (video, audio); the scheduler steps both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from denoised import CFGParallelMixin

CHANNELS = 8


class TwoStreams(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Video and audio tokens that see each other and the text through one linear layer each."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.video, self.audio = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        audio_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shift = text.mean(1, keepdim=True) * timestep[:, None, None] / 1000
        video, audio = self.video(hidden_states + shift), self.audio(audio_hidden_states - shift)
        return video + audio.mean(1, keepdim=True), audio + video.mean(1, keepdim=True)


class TwoModalityPipeline(DiffusionPipeline, CFGParallelMixin):  # type: ignore[misc]
    """Guidance over `num_branches` branches; returns the video and the audio latents."""

    def __init__(self, transformer: TwoStreams, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def predict_noise(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformer(*args, **kwargs)

    def scheduler_step(self, noise_pred: Any, t: Any, latents: Any) -> Any:
        sizes = [part.shape[1] for part in latents]
        step = self.scheduler.step(torch.cat(noise_pred, dim=1), t, torch.cat(latents, dim=1), return_dict=False)
        return step[0].split(sizes, dim=1)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 4,
        guidance_scale: float = 3.0,
        num_branches: int = 2,
        cfg_normalize: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[list[torch.Tensor]]:
        sizes = (6, 5)
        draw = [torch.randn(1, n, CHANNELS, generator=generator) for n in (*sizes, *([3] * num_branches))]
        latents, texts = tuple(draw[:2]), draw[2:]
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                branches = [
                    {
                        "hidden_states": latents[0],
                        "audio_hidden_states": latents[1],
                        "timestep": t.expand(1),
                        "text": text,
                    }
                    for text in texts
                ]
                scales = [guidance_scale] * (num_branches - 1)
                noise = self.predict_noise_with_multi_branch_cfg(num_branches > 1, scales, branches, cfg_normalize)
                latents = self.scheduler_step_maybe_with_cfg(noise, t, latents, num_branches > 1)
                bar.update()
        return (list(latents),)


def build() -> TwoModalityPipeline:
    torch.manual_seed(0)
    return TwoModalityPipeline(TwoStreams().eval(), FlowMatchEulerDiscreteScheduler())


def save(root: Path) -> str:
    """The pipeline as a folder."""
    build().save_pretrained(root)
    return str(root)
