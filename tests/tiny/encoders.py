"""Text encoders of a few thousand weights. Each takes the tokenizer whose vocabulary it embeds."""

from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.weights import randomize

WIDTH = 32  # hidden size of every encoder, unless its row needs another

_VISION_MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def clip(tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> CLIPTextModel:
    return randomize(CLIPTextModel(_clip_config(tokenizer)), seed)


def clip_projected(tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> CLIPTextModelWithProjection:
    return randomize(CLIPTextModelWithProjection(_clip_config(tokenizer)), seed)


def t5(tokenizer: PreTrainedTokenizerBase, width: int = WIDTH) -> T5EncoderModel:
    return randomize(T5EncoderModel(T5Config(**_t5_sizes(tokenizer, width), feed_forward_proj="gated-gelu")), 3)


def umt5(tokenizer: PreTrainedTokenizerBase) -> UMT5EncoderModel:
    return randomize(UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer))), 4)


def qwen2_5_vl(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    return randomize(Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(tokenizer)), 5)


def qwen2_5_vl_text(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLTextModel:
    return randomize(Qwen2_5_VLTextModel(_qwen2_5_vl_config(tokenizer).text_config), 5)


def qwen3(tokenizer: PreTrainedTokenizerBase) -> Qwen3Model:
    return randomize(Qwen3Model(_qwen3_config(tokenizer)), 6)


def qwen3_causal(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    return randomize(Qwen3ForCausalLM(_qwen3_config(tokenizer)), 6)


def mistral3(tokenizer: PreTrainedTokenizerBase) -> Mistral3ForConditionalGeneration:
    return randomize(Mistral3ForConditionalGeneration(_mistral3_config(tokenizer)), 7)


def mistral3_model(tokenizer: PreTrainedTokenizerBase) -> Mistral3Model:
    return randomize(Mistral3Model(_mistral3_config(tokenizer)), 7)


def llama(tokenizer: PreTrainedTokenizerBase, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(**decoder_sizes(tokenizer) | {"num_hidden_layers": layers})
    return randomize(LlamaForCausalLM(config), 9)


def gemma2(tokenizer: PreTrainedTokenizerBase) -> Gemma2Model:
    return randomize(Gemma2Model(Gemma2Config(head_dim=8, **decoder_sizes(tokenizer))), 8)


def gemma3(tokenizer: PreTrainedTokenizerBase) -> Gemma3ForConditionalGeneration:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=decoder_sizes(tokenizer) | {"head_dim": 8, "sliding_window": 32},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<mask>"),
    )
    return randomize(Gemma3ForConditionalGeneration(config), 10)


def _clip_config(tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_sizes(tokenizer: PreTrainedTokenizerBase, width: int = WIDTH) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), "d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def decoder_sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen3_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    return Qwen3Config(head_dim=8, **decoder_sizes(tokenizer))


def _mistral3_config(tokenizer: PreTrainedTokenizerBase) -> Mistral3Config:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 8} | decoder_sizes(tokenizer),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )


def _qwen2_5_vl_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=decoder_sizes(tokenizer) | {"rope_parameters": rope},
        vision_config=vision,
        **{key: tokenizer.convert_tokens_to_ids(mark) for key, mark in _VISION_MARKS.items()},
    )
