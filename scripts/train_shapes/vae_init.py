"""Starting weights of the autoencoder: it begins as an 8 x 8 mean of the colours, and learns the rest.

From the usual random weights a network normalised per pixel needs thousands of steps before colours survive it.
Here channels 0-2 of the stream carry the colours, channels 4-6 their negatives and channel 3 a constant, which keeps
the normalisation almost linear; `silu(a) - silu(-a) = a` makes the output layers exact.
"""

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageResample,
    QwenImageResidualBlock,
)
from torch import Tensor, nn

COLOR, CONSTANT, NEGATIVE = (0, 1, 2), 3, (4, 5, 6)
CARRIED = (*COLOR, CONSTANT, *NEGATIVE)
CONSTANT_VALUE = 3.0
LOG_VARIANCE = -6.0


@torch.no_grad()
def initialize(vae: AutoencoderKLQwenImage) -> None:
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            _randomize(module)
    for module in vae.modules():
        if isinstance(module, QwenImageResidualBlock):
            module.conv2.weight.mul_(0.05)
            if isinstance(module.conv_shortcut, nn.Module) and hasattr(module.conv_shortcut, "weight"):
                _carry(module.conv_shortcut)
        elif isinstance(module, QwenImageAttentionBlock):
            module.proj.weight.mul_(0.05)
        elif isinstance(module, QwenImageResample):
            _carry(module.resample[1], average=module.mode.startswith("down"))
    _enter(vae.encoder.conv_in)
    _enter(vae.decoder.conv_in)
    _leave(vae.encoder.conv_out, gain=1.25)
    _leave(vae.decoder.conv_out, gain=1.1)
    _connect_latents(vae)


def _taps(conv: nn.Module) -> Tensor:
    """The weights that meet the first frame, as `[out, in, y, x]`."""
    return conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight


def _randomize(conv: nn.Module) -> None:
    taps = _taps(conv)
    conv.weight.zero_()
    taps.normal_(0, (taps.shape[1] * taps.shape[2] * taps.shape[3]) ** -0.5)
    conv.bias.zero_()


def _carry(conv: nn.Module, *, average: bool = False) -> None:
    taps = _taps(conv)
    middle = taps.shape[2] // 2
    taps[list(CARRIED)] = 0
    for channel in CARRIED:
        if average:  # stride 2, padded at the right and the bottom
            taps[channel, channel, :2, :2] = 0.25
        else:
            taps[channel, channel, middle, middle] = 1


def _enter(conv: nn.Module) -> None:
    taps = _taps(conv)
    taps[list(CARRIED)] = 0
    for color, negative in zip(COLOR, NEGATIVE, strict=True):
        taps[color, color, 1, 1] = 1
        taps[negative, color, 1, 1] = -1
    conv.bias[CONSTANT] = CONSTANT_VALUE


def _leave(conv: nn.Module, *, gain: float) -> None:
    taps = _taps(conv)
    taps[list(COLOR)] = 0
    for color, negative in zip(COLOR, NEGATIVE, strict=True):
        taps[color, color, 1, 1] = gain
        taps[color, negative, 1, 1] = -gain


def _connect_latents(vae: AutoencoderKLQwenImage) -> None:
    taps = _taps(vae.quant_conv)
    taps.zero_()
    taps[: vae.z_dim, : vae.z_dim, 0, 0] = torch.eye(vae.z_dim)
    vae.quant_conv.bias[vae.z_dim :] = LOG_VARIANCE
    _taps(vae.post_quant_conv)[:, :, 0, 0] = torch.eye(vae.z_dim)
