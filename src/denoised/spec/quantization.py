"""What quantization leaves alone in every model. Data only; a model adds to it with `ModelSpec.unquantized`.

Only layers of blocks are quantized: those that stand in lists of modules. What embeds the input, the text and the
time, and what makes the output of the last block, is outside of them, small, and felt in all of the picture. Of a
block the layers below stay as they are: patterns for the parts of a layer's path, in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

UNQUANTIZED = (
    *("norm*", "*_norm", "*_norm[0-9]", "ln_*"),  # also the layers inside of norms that shift and scale
    *("*embed*", "shared", "lm_head", "caption_projection", "*_projector"),
    *("*_mod", "mod", "*modulation*", "adaln*", "*scale_shift*", "time_proj", "time_emb*", "*_emb"),
    *("gate", "*router*", "*gate_logits*"),  # who is asked decides more than what is answered
)


def is_left(path: str, patterns: Iterable[str] = ()) -> bool:
    """Whether a layer of this path is left as it is. patterns: those of the model, beside the usual ones."""
    words = path.lower().split(".")
    return any(fnmatchcase(word, pattern) for pattern in (*UNQUANTIZED, *patterns) for word in words)
