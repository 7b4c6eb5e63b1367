"""Stage `vae`: trains the autoencoder on crops of scenes, then measures the statistics of its latents."""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from .config import Config, VaeTraining
from .loop import Checkpoint, Log, cosine_rate, descend
from .render import SIDE, render
from .scenes import scene_at
from .single_frame import single_frame
from .vae_init import initialize

FRESH_SCENES = 1_000_000  # training scenes of this stage start here, away from those of the denoiser
HELD_OUT_SCENES = 2_000_000


def new_vae(settings: VaeTraining) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=settings.base_dim,
        z_dim=settings.z_dim,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * settings.z_dim,
        latents_std=[1.0] * settings.z_dim,
    )


def train_vae(config: Config) -> None:
    settings, folder = config.vae, config.out / "vae"
    if folder.exists():
        return
    torch.manual_seed(config.seed)
    vae = new_vae(settings)
    initialize(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(config.out / "vae.pt", {"model": vae, "optimizer": optimizer})
    log = Log(config.out / "vae.jsonl")
    loss_of = _Losses(settings)
    with single_frame():
        for step in range(checkpoint.load(), settings.steps):
            if step == settings.joint_steps:
                export_vae(vae, config.out / "vae_encoder")
            _freeze_encoder(vae, step >= settings.joint_steps)
            rate = cosine_rate(step, peak=settings.learning_rate, steps=settings.steps, warmup=100)
            loss, pixel = loss_of(vae, _batch(settings, step))
            descend(loss, optimizer, rate)
            if step % 20 == 0:
                log.write(step=step, loss=loss.item(), pixel=pixel.item())
            if (step + 1) % settings.checkpoint_every == 0:
                checkpoint.save(step + 1)
    export_vae(vae, folder)


def _freeze_encoder(vae: AutoencoderKLQwenImage, frozen: bool) -> None:
    vae.encoder.requires_grad_(not frozen)
    vae.quant_conv.requires_grad_(not frozen)


def _batch(settings: VaeTraining, step: int) -> Tensor:
    """Crops `[batch, rgb, 1, y, x]` at first, fewer whole pictures at the end."""
    whole = step >= settings.steps - settings.whole_steps
    side = SIDE if whole else settings.crop
    count = settings.batch_size * settings.crop**2 // side**2
    first = FRESH_SCENES + step * settings.batch_size
    pictures = render([scene_at(0, first + index) for index in range(count)])
    rng = random.Random(step)
    x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
    return pictures[:, :, None, y : y + side, x : x + side]


class _Losses:
    """The loss, compiled for crops only: for the few whole pictures a compilation costs more than it saves."""

    def __init__(self, settings: VaeTraining) -> None:
        self.settings = settings
        self.compiled = torch.compile(_loss, dynamic=False)

    def __call__(self, vae: AutoencoderKLQwenImage, pictures: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        function = self.compiled if pictures.shape[-1] == settings.crop else _loss
        noise = torch.randn(len(pictures), settings.z_dim, 1, pictures.shape[3] // 8, pictures.shape[4] // 8)
        with torch.autocast("cpu", torch.bfloat16):
            return function(vae, pictures, noise, settings.edge_weight, settings.kl_weight)


def _loss(
    vae: AutoencoderKLQwenImage, pictures: Tensor, noise: Tensor, edge: float, kl: float
) -> tuple[Tensor, Tensor]:
    """The loss and, to be logged, the mean error of the pixels."""
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + torch.exp(0.5 * log_variance) * noise
    error = vae.decoder(vae.post_quant_conv(latents)).float() - pictures
    pixel = error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return pixel + edge * edges + kl * divergence, pixel


@torch.no_grad()
def export_vae(trained: AutoencoderKLQwenImage, folder: Path) -> None:
    """Rounds the weights, registers the statistics of the latents and reports the quality on held-out scenes."""
    vae = AutoencoderKLQwenImage.from_config(trained.config)
    vae.load_state_dict(trained.state_dict())
    vae = vae.eval().to(torch.bfloat16).float()
    pictures = render([scene_at(0, HELD_OUT_SCENES + index) for index in range(256)])[:, :, None]
    with single_frame():
        latents = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)[0]
    dims = (0, 2, 3, 4)
    vae.register_to_config(latents_mean=latents.mean(dims).tolist(), latents_std=latents.std(dims).tolist())
    print("PSNR on held-out scenes:", round(psnr(vae, pictures[:64]), 2), "dB", flush=True)
    vae.to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, pictures: Tensor) -> float:
    """Mean over pictures."""
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    error = (decoded - pictures).square().mean((1, 2, 3, 4)) / 4
    return (-10 * error.log10()).mean().item()
