"""Stage `text`: teaches a small Qwen2.5-VL to read captions.

The pipeline conditions the denoiser on the last hidden states from the prompt on, the five tokens after it included.
Here those states are trained so that linear heads can read the content of the caption off them: each of the first
three suffix tokens tells one object, the fourth the scene, the fifth everything; each noun tells its own object.
The heads are thrown away afterwards.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from .captions import Caption, Mention, sample_caption
from .config import Config, TextTraining
from .loop import Checkpoint, Log, cosine_rate, descend
from .scenes import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, sample_scene
from .tokenizer import NUM_PREFIX, NUM_SUFFIX, PREFIX, SUFFIX, load_tokenizer

NUM_SLOTS = 3
MENTION_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, len(CELLS) + 1)  # class 0 is "not said"
NOUN_CLASSES = (*MENTION_CLASSES[:3], NUM_SLOTS)  # at the noun the place is still unknown, the slot is not
SCENE_CLASSES = (NUM_SLOTS + 1, len(BACKGROUNDS) + 1)


def new_text_encoder(settings: TextTraining, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The vision tower is never used by the pipeline; it is as small as the class permits."""
    quarter = settings.hidden_size // settings.num_heads // 8
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [quarter * 2, quarter, quarter],
            "rope_theta": 10_000.0,
        },
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": settings.hidden_size,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    }
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, tie_word_embeddings=True, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch:
    """Tokens of prompt and suffix, padded on the right; the prefix is the same for all and not held."""

    ids: Tensor  # [batch, token]
    lengths: Tensor  # [batch]


def tokenize(tokenizer: Qwen2Tokenizer, texts: list[str]) -> CaptionBatch:
    rows = tokenizer([text + SUFFIX for text in texts]).input_ids
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return CaptionBatch(ids=ids, lengths=lengths)


class PrefixedEncoder(nn.Module):
    """The text encoder, run once on the prompt template's prefix and then on what follows."""

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        self.encoder = encoder
        self.prefix = torch.tensor([tokenizer(PREFIX).input_ids])
        assert self.prefix.shape[1] == NUM_PREFIX

    def forward(self, ids: Tensor) -> Tensor:
        """`[batch, token, hidden]`, the states the pipeline hands to the denoiser. Attention is causal, so the
        padding on the right needs no mask."""
        language_model = self.encoder.model.language_model
        cache = DynamicCache(config=self.encoder.config.text_config)
        language_model(input_ids=self.prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
        return language_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


class Heads(nn.Module):
    """Linear readers of the hidden states; the loss they give is what the encoder learns from."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.slots = nn.ModuleList(nn.Linear(hidden_size, sum(MENTION_CLASSES)) for _ in range(NUM_SLOTS))
        self.scene = nn.Linear(hidden_size, sum(SCENE_CLASSES))
        self.everything = nn.Linear(hidden_size, NUM_SLOTS * sum(MENTION_CLASSES) + sum(SCENE_CLASSES))
        self.noun = nn.Linear(hidden_size, sum(NOUN_CLASSES))

    def forward(self, states: Tensor, batch: CaptionBatch, targets: "Targets") -> tuple[Tensor, Tensor]:
        """The loss, and the share of captions of which every attribute is read rightly."""
        rows = torch.arange(len(states))[:, None]
        suffix = states[rows, batch.lengths[:, None] - NUM_SUFFIX + torch.arange(NUM_SUFFIX)]
        slots = torch.cat([head(suffix[:, slot]) for slot, head in enumerate(self.slots)], dim=1)
        logits = torch.cat([slots, self.scene(suffix[:, NUM_SLOTS])], dim=1)
        classes = MENTION_CLASSES * NUM_SLOTS + SCENE_CLASSES
        loss, right = _classify(logits, targets.content, classes)
        loss = loss + _classify(self.everything(suffix[:, -1]), targets.content, classes)[0]
        nouns = self.noun(states[targets.noun_rows, targets.noun_tokens])
        return loss + 0.5 * _classify(nouns, targets.nouns, NOUN_CLASSES)[0], right


def _classify(logits: Tensor, targets: Tensor, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    parts = list(zip(logits.float().split(classes, dim=1), targets.unbind(1), strict=True))
    loss = torch.stack([nn.functional.cross_entropy(part, target) for part, target in parts]).sum()
    right = torch.stack([part.argmax(1) == target for part, target in parts]).all(0).float().mean()
    return loss, right


@dataclass(frozen=True, kw_only=True)
class Targets:
    content: Tensor  # [batch, 3 mentions x 4 attributes + count + background]
    nouns: Tensor  # [noun, 3 attributes + slot]
    noun_rows: Tensor
    noun_tokens: Tensor


def targets_of(tokenizer: Qwen2Tokenizer, captions: list[Caption]) -> Targets:
    content, nouns, rows, tokens = [], [], [], []
    encoded = tokenizer([caption.text for caption in captions])
    for row, caption in enumerate(captions):
        claim = caption.claim
        mentions = [_classes(mention) for mention in claim.mentions]
        padded = mentions + [[0] * len(MENTION_CLASSES)] * (NUM_SLOTS - len(mentions))
        scene = (claim.count or 0, _class(claim.background, tuple(BACKGROUNDS)))
        content.append([*itertools.chain.from_iterable(padded), *scene])
        for slot, end in enumerate(caption.nouns):
            nouns.append([*mentions[slot][:3], slot if len(set(caption.nouns)) > 1 else 0])
            rows.append(row)
            tokens.append(encoded.char_to_token(row, end - 1))
    return Targets(
        content=torch.tensor(content),
        nouns=torch.tensor(nouns),
        noun_rows=torch.tensor(rows),
        noun_tokens=torch.tensor(tokens),
    )


def _classes(mention: Mention) -> list[int]:
    said = ((mention.shape, SHAPES), (mention.color, tuple(COLORS)), (mention.size, SIZES), (mention.cell, CELLS))
    return [_class(value, values) for value, values in said]


def _class(value: object, values: tuple) -> int:
    return 0 if value is None else 1 + values.index(value)


def train_text_encoder(config: Config) -> None:
    settings, folder = config.text, config.out / "text_encoder"
    if folder.exists():
        return
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config)
    encoder, heads = new_text_encoder(settings, tokenizer), Heads(settings.hidden_size)
    reader = PrefixedEncoder(encoder, tokenizer)
    parameters = [*encoder.model.language_model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = Checkpoint(config.out / "text_encoder.pt", {"model": encoder, "heads": heads, "optimizer": optimizer})
    log = Log(config.out / "text_encoder.jsonl")
    for step in range(checkpoint.load(), settings.steps):
        rate = cosine_rate(step, peak=settings.learning_rate, steps=settings.steps, warmup=100)
        captions = _captions(step, settings.batch_size)
        batch, targets = tokenize(tokenizer, [c.text for c in captions]), targets_of(tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = heads(reader(batch.ids), batch, targets)
        descend(loss, optimizer, rate)
        if step % 20 == 0:
            log.write(step=step, loss=loss.item(), right=right.item())
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoint.save(step + 1)
    encoder.eval().to(torch.bfloat16).save_pretrained(folder)


def _captions(step: int, count: int) -> list[Caption]:
    rng = random.Random(f"text-{step}")
    return [sample_caption(rng, sample_scene(rng)) for _ in range(count)]
