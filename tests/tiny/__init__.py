"""Complete diffusers checkpoints with tiny random weights, built in code, and requests for them."""

from pathlib import Path

from tests.tiny import (
    cosmos,
    ernie,
    flux,
    flux2,
    glm,
    helios,
    hidream,
    hunyuan_video,
    longcat,
    ltx2,
    qwen,
    qwen_edit,
    stable_audio,
    stable_diffusion,
    unspecified,
    wan,
    wan_vace,
    z_image,
)
from tests.tiny.row import Request, Row
from tests.tiny.sizes import small_images, small_tiles
from tests.tiny.store import save_once

_FAMILIES = (
    qwen,
    qwen_edit,
    stable_diffusion,
    flux,
    flux2,
    wan,
    wan_vace,
    z_image,
    longcat,
    ernie,
    hidream,
    glm,
    hunyuan_video,
    ltx2,
    helios,
    cosmos,
    stable_audio,
    unspecified,
)

ROWS: dict[str, Row] = {row.name: row for family in _FAMILIES for row in family.ROWS}

# Filters for pytest, for warnings that the libraries below us cause among themselves.
UPSTREAM_WARNINGS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # schedulers: numpy 2
    "ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning",  # the scheduler of Helios
    "ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning",  # the VAE of Stable Audio
    "ignore:Should have t[ab][<>]=t[01] but got:UserWarning",  # torchsde, at the ends of the range of sigmas
)


def checkpoint(name: str, root: Path) -> Path:
    """The folder of the named row's checkpoint under `root`, built if it is not there."""
    return save_once(ROWS[name], root)


__all__ = ["ROWS", "UPSTREAM_WARNINGS", "Request", "Row", "checkpoint", "small_images", "small_tiles"]
