"""HiDream-I1: four text encoders, experts in every feed-forward, both guidance branches in one batch.

The pipeline scales every size to one area, which `small_images` makes 32 x 32 pixels.
"""

from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4
_LLAMA_LAYERS = 3


def _transformer() -> HiDreamImageTransformer2DModel:
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[encoders.WIDTH, encoders.WIDTH],
        text_emb_dim=2 * encoders.WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 2, 2],
    )
    return randomize(model, 121)


def _build() -> HiDreamImagePipeline:
    clip, t5, llama = tokenizers.clip(), tokenizers.t5(), tokenizers.llama()
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vaes.kl(_CHANNELS),
        text_encoder=encoders.clip_projected(clip, seed=1),
        tokenizer=clip,
        text_encoder_2=encoders.clip_projected(clip, seed=2),
        tokenizer_2=clip,
        text_encoder_3=encoders.t5(t5),
        tokenizer_3=t5,
        text_encoder_4=encoders.llama(llama, layers=_LLAMA_LAYERS),
        tokenizer_4=llama,
        transformer=_transformer(),
    )


def _unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 64))
    return sizes | {"guidance_scale": 1.0, "max_sequence_length": 40}


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}


ROWS = (Row(name="hidream_i1", build=_build, request=_request, unguided=_unguided, branches=2, batched=True),)
