"""Stage `tokenizer`: a byte-level BPE on the captions, in which the pipeline's prompt template has its 34 tokens."""

import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .captions import sample_caption
from .config import Config
from .scenes import sample_scene

NAMES = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in NAMES)
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX, SUFFIX = TEMPLATE.split("{}")
NUM_PREFIX = 34  # `prompt_template_encode_start_idx` of the pipeline
NUM_SUFFIX = 5
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(config: Config) -> None:
    folder = config.out / "tokenizer"
    if folder.exists():
        return
    tokenizer = _new_tokenizer(_train_bpe(config))
    assert len(tokenizer(PREFIX).input_ids) == NUM_PREFIX
    assert len(tokenizer(SUFFIX).input_ids) == NUM_SUFFIX
    tokenizer.save_pretrained(folder)


def load_tokenizer(config: Config) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(config.out / "tokenizer")


def _train_bpe(config: Config) -> dict:
    """Splits words as Qwen2Tokenizer will; otherwise the merges would not apply."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(config.seed)
    captions = [sample_caption(rng, sample_scene(rng)).text for _ in range(20_000)]
    template = TEMPLATE
    for token in SPECIAL:
        template = template.replace(token, " ")
    trainer = trainers.BpeTrainer(
        vocab_size=config.text.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(captions + ["system\n", "user\n", "assistant\n", template] * 500, trainer)
    return json.loads(bpe.to_str())["model"]


def _new_tokenizer(bpe: dict) -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]], model_max_length=1024 + NUM_PREFIX
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
