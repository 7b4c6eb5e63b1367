"""GLM-Image: a language model writes the picture's coarse tokens, then two calls a step make the picture of them.

Pictures to edit go through the transformer first, which keeps their keys and values in a store that the later calls
are given.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, PreTrainedTokenizerBase

from tests.tiny import encoders, tokenizers, vaes, vision
from tests.tiny.pictures import picture
from tests.tiny.row import PROMPTS, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4
_CODES = 64  # coarse tokens that the language model can write


def _transformer() -> GlmImageTransformer2DModel:
    model = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=encoders.WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=_CODES,
    )
    return randomize(model, 161)


def _writer(tokenizer: PreTrainedTokenizerBase) -> GlmImageForConditionalGeneration:
    text = encoders.decoder_sizes(tokenizer) | {
        "vision_vocab_size": _CODES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    eyes = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = GlmImageConfig(
        text_config=text,
        vision_config=eyes,
        vq_config={"embed_dim": 16, "num_embeddings": _CODES, "latent_channels": 16},
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        image_start_token_id=tokenizer.bos_token_id,
        image_end_token_id=tokenizer.eos_token_id,
    )
    return randomize(GlmImageForConditionalGeneration(config), 162)


def _vae() -> AutoencoderKL:
    means = {
        "latents_mean": [0.1 * i for i in range(_CHANNELS)],
        "latents_std": [1 + 0.1 * i for i in range(_CHANNELS)],
    }
    return vaes.kl(_CHANNELS, stages=4, **means)


def _build() -> GlmImagePipeline:
    glyphs, tokenizer = ByT5Tokenizer(extra_ids=0), tokenizers.glm()
    return GlmImagePipeline(
        tokenizer=glyphs,
        processor=vision.glm_processor(tokenizer),
        text_encoder=encoders.t5(glyphs),
        vision_language_encoder=_writer(tokenizer),
        vae=_vae(),
        transformer=_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )


def _unguided(i: int) -> Request:
    sizes = varied(i, steps=(4, 3, 5), height=(64, 64, 64), width=(64, 64, 96))
    return sizes | {"prompt": f"{PROMPTS[i]} says '{PROMPTS[i][:5]}'", "guidance_scale": 1.0}


def _request(i: int) -> Request:
    """The last request edits a picture. It brings the coarse tokens of both pictures along: the pipeline's own way to
    them, through the language model, fails with the transformers of today."""
    return _unguided(i) | {"guidance_scale": 3.0} | (_edit(tokens=4 * 6) if i == 2 else {})


def _edit(tokens: int) -> Request:
    codes = torch.Generator().manual_seed(163)
    return {
        "image": [picture(64, 64)],
        "prior_token_ids": torch.randint(_CODES, (1, tokens), generator=codes),
        "prior_token_image_ids": [torch.randint(_CODES, (16,), generator=codes)],
        "source_image_grid_thw": [torch.tensor([[1, 4, 4]])],
    }


ROWS = (Row(name="glm_image", build=_build, request=_request, unguided=_unguided, branches=2),)
