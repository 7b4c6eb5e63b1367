"""Tokenizers of a handful of words, one for each family of text encoders, the same in every process."""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BatchEncoding,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from tests.tiny.row import NEGATIVE, PROMPTS

# Words of the prompt templates that pipelines wrap around a prompt: with these in the vocabulary a template is
# about as many tokens long as with the real tokenizer, and the fixed number that is dropped again stays inside it.
_WORDS = (
    "system user assistant image images text input describe detailing color shape size texture quantity spatial "
    "relationships objects background key features explain instruction should alter modify generate new meets "
    "requirements while maintaining consistency original appropriate picture expert captioning descriptive content "
    "suitable model editing analyze attributes determine specified parts changed remain consistent other aspects"
)
_CORPUS = [*PROMPTS, NEGATIVE, *(" " + word for word in _WORDS.split())]

# diffusers finds the base class that says how to load a component by its name, in the module of the component.
__all__ = ["PreTrainedTokenizerFast", "ShortQwenTokenizer", "clip", "gemma", "glm", "llama", "qwen", "t5"]

_QWEN_SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Content is a string or a list of parts. A system turn is left out: those of FLUX.2 would fill the tiny context.
_NO_SYSTEM = " if m['role'] != 'system'"
_CHAT_TEMPLATE = (
    f"{{% for m in messages{_NO_SYSTEM} %}}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _byte_pairs() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]  # the only form that tells the merges
    return model


@cache
def _pieces() -> list[tuple[str, float]]:
    """Words and characters with made-up scores; the library's training for these differs from run to run."""
    words = sorted({word.strip(",") for line in _CORPUS for word in line.split()})
    characters = sorted({char for word in words for char in word} | {","})
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored = [("▁" + word, -5.0) for word in words if len(word) > 1]
    return [*specials, *scored, ("▁", -8.0), *((char, -9.0) for char in characters)]


class ShortQwenTokenizer(Qwen2Tokenizer):  # type: ignore[misc]
    """Pads to 64 tokens at most. The LongCat pipelines ask for 512, which would be most of the work of a tiny run."""

    def pad(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> BatchEncoding:
        return super().pad(*args, max_length=min(max_length or 64, 64), **kwargs)


def qwen(kind: type[Qwen2Tokenizer] = Qwen2Tokenizer, *, system: bool = False) -> Qwen2Tokenizer:
    """Byte-level BPE with the chat and vision marks of Qwen 2.5-VL; it serves Qwen3 and Mistral too.

    `system` keeps the system turns, for pipelines that drop a fixed number of tokens, as long as these.
    """
    model = _byte_pairs()
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = kind(vocab=model["vocab"], merges=merges, model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN_SPECIALS)})
    tokenizer.chat_template = _CHAT_TEMPLATE.replace(_NO_SYSTEM, "") if system else _CHAT_TEMPLATE
    return tokenizer


def t5(max_length: int = 512) -> T5Tokenizer:
    return T5Tokenizer(vocab=_pieces(), extra_ids=0, model_max_length=max_length)


def clip() -> CLIPTokenizer:
    """One token a character: CLIP reads 77 of them, enough for the prompts of the rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(char + "</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def llama() -> PreTrainedTokenizerFast:
    """The byte pairs of Qwen with the marks that Llama has."""
    marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(), model_max_length=1024, **marks)


def glm() -> PreTrainedTokenizerFast:
    """The byte pairs of Qwen with the marks that GLM-Image has around pictures and their sizes."""
    marks = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(),
        model_max_length=1024,
        bos_token="<|image_start|>",
        eos_token="<|image_end|>",  # no token that the tiny model can write, which must not stop early
        pad_token="<|endoftext|>",
        extra_special_tokens=marks,
    )
    picture = "<|image_start|><|image|><|image_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% else %}}{picture}{{% endif %}}{{% endfor %}}{{% endfor %}}"
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    model = _byte_pairs()
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def gemma() -> GemmaTokenizer:
    """One token a character: without merges only those pieces are used that are one character long."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(piece for piece, _ in _pieces()[3:])]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=512)
