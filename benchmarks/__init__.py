"""Benchmarks: each prints JSON and a table, compares in one run, interleaved, as ratios."""

import denoised.hf  # noqa: F401  before diffusers, so that what torchao says when it is imported is not printed
