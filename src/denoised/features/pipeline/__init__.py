"""Pipeline parallelism for every denoiser that has lists of blocks: `apply` cuts it, `Stages` runs rows through it.

Nothing is said of any model. What crosses from stage to stage is found out by watching the first forward of each
signature: which outputs of which blocks the blocks and the output of another stage were computed from.
"""

from denoised.features.pipeline.clock import Mark
from denoised.features.pipeline.cut import MAX_ROUNDS, deal
from denoised.features.pipeline.stages import Stages, apply

__all__ = ["MAX_ROUNDS", "Mark", "Stages", "apply", "deal"]
