"""Autoencoders that more than one family uses."""

from diffusers import AutoencoderKL

from tests.tiny.weights import randomize


def kl(
    channels: int, *, stages: int = 2, shift: float | None = 0.0609, scale: float = 1.5, **statistics: list[float]
) -> AutoencoderKL:
    """The image VAE of most families; each stage after the first halves width and height."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(8,) * stages,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        **statistics,
    )
    return randomize(vae, 11)
