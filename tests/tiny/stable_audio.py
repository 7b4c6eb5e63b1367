"""Stable Audio Open: sound, a scheduler that draws noise at each step, one call with both branches."""

from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

from tests.tiny import encoders, tokenizers
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 8


def _transformer() -> StableAudioDiTModel:
    return StableAudioDiTModel(
        sample_size=64,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=encoders.WIDTH,
        cross_attention_input_dim=encoders.WIDTH,
        global_states_input_dim=2 * encoders.WIDTH,
        time_proj_dim=32,
    )


def _build() -> StableAudioPipeline:
    tokenizer = tokenizers.t5(max_length=32)  # the pipeline pads to it
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=_CHANNELS,
        audio_channels=2,
        sampling_rate=64,
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=encoders.WIDTH, conditioning_dim=encoders.WIDTH, min_value=0, max_value=32
    )
    return StableAudioPipeline(
        vae=randomize(vae, 91, gain=0.5),
        text_encoder=encoders.t5(tokenizer),
        projection_model=randomize(projection, 92),
        tokenizer=tokenizer,
        transformer=randomize(_transformer(), 93),
        scheduler=CosineDPMSolverMultistepScheduler(solver_order=2),
    )


def _unguided(i: int) -> Request:
    """The latents are always of full length; a shorter sound is cut out at the end."""
    return varied(i, audio_end_in_s=(4.0, 6.0, 8.0)) | {"guidance_scale": 1.0}


def _request(i: int) -> Request:
    """Without a negative prompt, as in the last request, the unconditional text is zeros."""
    negative = {"negative_prompt": NEGATIVE} if i < 2 else {}
    return _unguided(i) | {"guidance_scale": 3.0} | negative


ROWS = (
    Row(
        name="stable_audio",
        build=_build,
        request=_request,
        unguided=_unguided,
        branches=2,
        batched=True,
        kind="audio",
    ),
)
