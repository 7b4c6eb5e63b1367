"""What ranks share beside the denoiser, on every row: the matrices of text encoders, and the tiles of the VAE."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from denoised.errors import InvalidConfigError
from tests.contract.parallel import check, counts, degrees_of, run
from tests.contract.support import ORDER

ENCODERS_REFUSED: dict[str, str] = {}


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.cell("text_encoder_tp")
def test_text_encoders(name: str, record_property: Callable[[str, object], None]) -> None:
    """Halves of the text encoders' matrices on two ranks."""
    degrees = degrees_of("text_encoder_tp")
    if name in ENCODERS_REFUSED:
        with pytest.raises(InvalidConfigError, match=ENCODERS_REFUSED[name]) as caught:
            run(name, [0], **degrees)
        record_property("refused", str(caught.value))
        return
    outputs = run(name, [0, 1], **degrees)
    check(name, outputs, [0, 1])
    assert all(counted["all_reduce"] > 0 for counted in counts(outputs)), counts(outputs)
