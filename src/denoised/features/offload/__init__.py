"""Weights that are on the device only while they are needed: of whole components, or block by block.

Where weights are meanwhile is not known here: a `Home` says what stands for a tensor that is away, and fetches it. On
an accelerator it has copies in pinned memory, on the CPU the files themselves. What stands for a tensor may be
computed with, slowly, so that whoever uses a weight in a way that nobody foresaw still gets the right numbers.
"""

from denoised.features.offload.component import FIELDS, Offload
from denoised.features.offload.store import Home

__all__ = ["FIELDS", "Home", "Offload"]
