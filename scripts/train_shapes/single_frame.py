"""The causal 3-D convolutions of the VAE, computed as 2-D ones: the same result for pictures, at a third of the cost.

A picture is a video of one frame. In front of it the causal padding puts two empty frames, so only the last temporal
slice of each kernel ever meets data. Used while training and encoding; the exported model is the unmodified class.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from torch import Tensor
from torch.nn.functional import conv2d


@contextmanager
def single_frame() -> Iterator[None]:
    """Inside, the VAE's encoder and decoder accept `[batch, channel, 1, y, x]` only."""
    saved = QwenImageCausalConv3d.forward, QwenImageRMS_norm.forward
    QwenImageCausalConv3d.forward, QwenImageRMS_norm.forward = _convolve, _normalize
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward, QwenImageRMS_norm.forward = saved


def _convolve(conv: QwenImageCausalConv3d, x: Tensor, cache_x: None = None) -> Tensor:
    padding = (conv._padding[2], conv._padding[0])
    return conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], padding).unsqueeze(2)


def _normalize(norm: QwenImageRMS_norm, x: Tensor) -> Tensor:
    """The same norm with one pass less over memory; the sum is taken in float32."""
    inverse = x.float().square().mean(1, keepdim=True).add(1e-12).rsqrt()
    return x * inverse.to(x.dtype) * norm.gamma.to(x.dtype)
