"""Configurations of models of real size, as their publishers state them: sizes alone, no weights and no tokenizers."""

import json
from pathlib import Path
from typing import Any

T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
UMT5_XXL = T5_XXL | {"model_type": "umt5", "architectures": ["UMT5EncoderModel"], "vocab_size": 256384}
QWEN25_VL_7B = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": False,
}
CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
KL_16 = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN_TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel",
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "in_channels": 64,
    "out_channels": 16,
    "patch_size": 2,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
    "guidance_embeds": True,
}
WAN_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "num_layers": 40,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}

# Pipeline to its components: library and configuration. The class is the configuration's own.
MODELS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {
        "scheduler": FLOW,
        "text_encoder": QWEN25_VL_7B,
        "tokenizer": "Qwen2Tokenizer",
        "transformer": QWEN_TRANSFORMER,
        "vae": {"_class_name": "AutoencoderKLQwenImage"},
    },
    "FluxPipeline": {
        "scheduler": FLOW,
        "text_encoder": CLIP_L | {"architectures": ["CLIPTextModel"]},
        "text_encoder_2": T5_XXL,
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
        "transformer": FLUX_TRANSFORMER,
        "vae": KL_16,
    },
    "WanPipeline": {
        "boundary_ratio": 0.875,
        "scheduler": UNIPC,
        "text_encoder": UMT5_XXL,
        "tokenizer": "T5TokenizerFast",
        "transformer": WAN_TRANSFORMER,
        "transformer_2": WAN_TRANSFORMER,
        "vae": {"_class_name": "AutoencoderKLWan"},
    },
}


def written(pipeline: str, root: Path) -> Path:
    """A folder with the configuration of a pipeline and nothing else."""
    folder = root / pipeline
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, config in MODELS[pipeline].items():
        index[name] = _entry(config)
        if isinstance(config, dict):
            (folder / name).mkdir(parents=True, exist_ok=True)
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (folder / name / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _entry(config: Any) -> Any:
    if isinstance(config, dict):
        return ["diffusers", config["_class_name"]] if "_class_name" in config else _transformers(config)
    return ["transformers", config] if isinstance(config, str) else config


def _transformers(config: dict[str, Any]) -> list[str]:
    return ["transformers", config["architectures"][0]]
