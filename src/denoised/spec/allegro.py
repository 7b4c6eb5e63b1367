"""Allegro: a latent has four frames, the first one too, so its own default of 88 frames is no multiple plus one."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (ModelSpec(pipeline="AllegroPipeline", kind="video", chunked=True, shared=frozenset({"image_rotary_emb"})),)
