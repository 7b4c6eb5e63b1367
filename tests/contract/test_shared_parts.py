"""What ranks share beside the denoiser, on every row: the matrices of text encoders, and the tiles of the VAE."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from denoised.errors import InvalidConfigError
from tests.contract.parallel import SMALL_TILES, acted, check, counts, degrees_of, run, run_requests, tiled
from tests.contract.support import ORDER, REORDERED, difference, media, request_of
from tests.tiny.pictures import picture
from tests.tiny.row import Request

NO_ENCODER = ("cosmos3_image", "cosmos3_video")
# Larger than the rows' own pictures where those are one tile.
SIZES: dict[str, Request] = {
    "hidream_i1": {"height": 16, "width": 64},
    "flux2_dev": {"height": 96, "width": 128},
    "flux2_klein": {"height": 96, "width": 128},
    "ernie_image": {"height": 96, "width": 128},
    "flux_kontext": {"height": 64, "width": 96, "max_area": 64 * 96, "image": picture(64, 64)},
}
# Rows whose pictures or videos are read, too.
READING = (
    *("qwen_image_edit", "qwen_image_edit_plus", "qwen_image_layered", "flux_kontext", "longcat_image_edit"),
    *("wan22_i2v", "wan21_vace", "hunyuan_video15_i2v"),
)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.cell("text_encoder_tp")
def test_text_encoders(name: str, record_property: Callable[[str, object], None]) -> None:
    """Halves of the text encoders' matrices on two ranks."""
    degrees = degrees_of("text_encoder_tp")
    if name in NO_ENCODER:
        with pytest.raises(InvalidConfigError, match="has no text encoder") as caught:
            run(name, [0], **degrees)
        record_property("refused", str(caught.value))
        return
    outputs = run(name, [0, 1], **degrees)
    check(name, outputs, [0, 1], ["text_encoder_tp"])
    acted(outputs, ["text_encoder_tp"])


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.cell("vae_patch")
def test_vae_tiles(name: str) -> None:
    """Tiles of decode, and of encode where the row reads pictures, on two ranks: what the VAE's own tiling gives."""
    request = _large(name)
    (output,) = run_requests(name, [request], output_type="pt", plugins=SMALL_TILES, **degrees_of("vae_patch"))
    assert difference(tiled(name, request, 0), media(output)) <= REORDERED
    for method in ("decode", "encode") if name in READING else ("decode",):
        tiles = [counted[f"vae_{method}_tiles"] for counted in counts([output])]
        assert min(tiles) > 0, (method, tiles)
        assert max(tiles) - min(tiles) <= 1, (method, tiles)


def _large(name: str) -> Request:
    """The row's request for a picture of several tiles, in two steps where it says how many."""
    request = request_of(name, 0)
    larger = SIZES.get(name, {"height": 64, "width": 96} if "height" in request else {})
    steps = {"num_inference_steps": 2} if "num_inference_steps" in request else {}
    return request | larger | steps
