"""What the checks of all rows do not look at: sound beside a video, and texts of different lengths in one forward."""

from __future__ import annotations

import pytest
import torch

from tests.contract.support import (
    EXACT,
    REORDERED,
    _pipeline,
    ask,
    difference,
    engine,
    folder,
    latent_type,
    media,
    reference,
    request_of,
    seed_of,
    tensors,
)


@pytest.mark.parametrize("name", ["ltx2", "ltx23"])
def test_sound_beside_the_video(name: str) -> None:
    with engine(name) as omni:
        (output,) = ask(omni, name, [0], "pt")
    generator = torch.Generator().manual_seed(seed_of(0))
    plain = _pipeline(folder(name))(**request_of(name, 0), generator=generator, output_type="pt")
    assert difference(tensors(plain.audio), tensors(output.audios)) == EXACT
    assert tensors(output.audios)[0].std() > 1e-3, "silence is equal to silence"


@pytest.mark.parametrize("name", ["ernie_image", "hidream_i1", "glm_image"])
def test_requests_with_other_texts_share_forwards(name: str) -> None:
    """Where a model can tell padding from text, or its texts all have one length."""
    kind = latent_type(name)
    with engine(name) as omni:
        outputs = ask(omni, name, [0, 1], kind)
    for index, output in enumerate(outputs):
        assert difference(reference(name, index, kind), media(output)) <= REORDERED
        assert output.receipt is not None
        assert output.receipt.rows_joined > 0
