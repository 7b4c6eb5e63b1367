"""Tests, and what they share; ranks of `tests/ranks.py` import this first too."""

import denoised.hf  # noqa: F401  before diffusers, so that what torchao says when it is imported is not printed
