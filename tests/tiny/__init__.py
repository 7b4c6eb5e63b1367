"""Complete diffusers checkpoints with tiny random weights, built in code, and requests for them."""

from pathlib import Path

from tests.tiny import flux, flux2, longcat, qwen, qwen_edit, stable_audio, stable_diffusion, unspecified, wan, z_image
from tests.tiny.row import Request, Row
from tests.tiny.sizes import small_images
from tests.tiny.store import save_once

_FAMILIES = (qwen, qwen_edit, stable_diffusion, flux, flux2, wan, z_image, longcat, stable_audio, unspecified)

ROWS: dict[str, Row] = {row.name: row for family in _FAMILIES for row in family.ROWS}

# Filters for pytest, for warnings that the libraries below us cause among themselves.
UPSTREAM_WARNINGS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # schedulers: numpy 2
    "ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning",  # the VAE of Stable Audio
    "ignore:Should have t[ab][<>]=t[01] but got:UserWarning",  # torchsde, at the ends of the range of sigmas
)


def checkpoint(name: str, root: Path) -> Path:
    """The folder of the named row's checkpoint under `root`, built if it is not there."""
    return save_once(ROWS[name], root)


__all__ = ["ROWS", "UPSTREAM_WARNINGS", "Request", "Row", "checkpoint", "small_images"]
