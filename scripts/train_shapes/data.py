"""Stages `latents` and `embeddings`: scenes and captions, encoded once by the finished VAE and text encoder."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .captions import sample_caption
from .config import Config
from .render import render
from .scenes import Scene, scene_at
from .single_frame import single_frame
from .text_encoder import PrefixedEncoder, tokenize
from .tokenizer import load_tokenizer

LATENT_SIDE = 16  # latents a side of a picture
OBJECT_WEIGHT = {"small": 6.0, "large": 3.0}  # of the loss at a latent near an object, beyond the 1 of any latent
LENGTHS = (20, 28, 40)  # texts are padded to one of these, so that few shapes are compiled
MAX_LENGTH = LENGTHS[-1]


def pack(latents: Tensor) -> Tensor:
    """`[batch, channel, 1, 2y, 2x]` to the denoiser's `[batch, y x, channel 2 2]`, as the pipeline does it."""
    batch, channels, _, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def loss_weights(scene: Scene) -> Tensor:
    """What each latent counts in the loss, packed, `[y x, channel 2 2]`, mean 1: objects more than the background.

    The best prediction of a latent is the same under any weight; this only says where a small model spends itself.
    """
    weights = torch.ones(LATENT_SIDE, LATENT_SIDE)
    centres = (torch.arange(LATENT_SIDE) + 0.5) / LATENT_SIDE
    for item in scene.items:
        reach = item.radius + 0.5 / LATENT_SIDE
        near_y, near_x = ((centres - middle).abs() < reach for middle in (item.y, item.x))
        weights += OBJECT_WEIGHT[item.size] * (near_y[:, None] & near_x)
    return pack((weights / weights.mean())[None, None, None])[0]


def shards(config: Config) -> range:
    return range(0, config.data.num_scenes, config.data.shard_scenes)


@torch.no_grad()
def encode_latents(config: Config) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(config.out / "vae_encoder", torch_dtype=torch.float32)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    for start in shards(config):
        path = config.out / f"latents_{start}.pt"
        if path.exists():
            continue
        rows = []
        for first in range(start, start + config.data.shard_scenes, 32):
            pictures = render([scene_at(config.seed, first + index) for index in range(32)])[:, :, None]
            with single_frame(), torch.autocast("cpu", torch.bfloat16):
                latents = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, dim=1)[0]
            rows.append(pack((latents - mean) / std).bfloat16())
        _save(torch.cat(rows), path)


@torch.no_grad()
def encode_captions(config: Config) -> None:
    tokenizer = load_tokenizer(config)
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.out / "text_encoder", dtype=torch.bfloat16)
    reader = PrefixedEncoder(encoder.eval(), tokenizer)
    for start in shards(config):
        path = config.out / f"captions_{start}.pt"
        if path.exists():
            continue
        texts = _texts(config, start)
        states: list[Tensor] = [torch.empty(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for first in range(0, len(order), 256):
            chosen = order[first : first + 256]
            batch = tokenize(tokenizer, [texts[index] for index in chosen])
            for index, row, length in zip(chosen, reader(batch.ids), batch.lengths.tolist(), strict=True):
                states[index] = row[:length].clone()
        lengths = torch.tensor([len(row) for row in states])
        assert lengths.max() <= MAX_LENGTH
        _save({"states": torch.cat(states), "lengths": lengths}, path)


def _texts(config: Config, start: int) -> list[str]:
    """The captions of one shard; those of a scene follow one another."""
    texts = []
    for index in range(start, start + config.data.shard_scenes):
        rng = random.Random(f"caption-{config.seed}-{index}")
        scene = scene_at(config.seed, index)
        while len(texts) < (index - start + 1) * config.data.captions_per_scene:
            texts.append(sample_caption(rng, scene).text)
    return texts


def _save(value: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    temporary.replace(path)


@dataclass(frozen=True, kw_only=True)
class Example:
    latents: Tensor  # [batch, image token, 64]
    text: Tensor  # [batch, text token, hidden], padded with zeros
    mask: Tensor  # [batch, text token]
    weights: Tensor  # [batch, image token, 64], mean 1 over the tokens


class Dataset:
    """All shards in memory, cut into batches of captions of similar length."""

    def __init__(self, config: Config) -> None:
        self.captions_per_scene = config.data.captions_per_scene
        self.latents = torch.cat([torch.load(config.out / f"latents_{start}.pt") for start in shards(config)])
        scenes = range(len(self.latents))
        self.weights = torch.stack([loss_weights(scene_at(config.seed, index)) for index in scenes])
        loaded = [torch.load(config.out / f"captions_{start}.pt") for start in shards(config)]
        self.states = torch.cat([shard.pop("states") for shard in loaded])
        self.lengths = torch.cat([shard["lengths"] for shard in loaded])
        self.offsets = self.lengths.cumsum(0) - self.lengths
        self.bucket = torch.bucketize(self.lengths, torch.tensor(LENGTHS))

    def batches(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Endless caption indices, seeded; one epoch shows each caption once, but for the rests of the buckets."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 1000 + epoch)
            order = torch.randperm(len(self.lengths), generator=generator)
            batches = []
            for bucket in range(len(LENGTHS)):
                batches += order[self.bucket[order] == bucket].split(batch_size)
            batches = [batch for batch in batches if len(batch) == batch_size]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]
            epoch += 1

    def example(self, captions: Tensor) -> Example:
        lengths = self.lengths[captions]
        positions = torch.arange(LENGTHS[int(self.bucket[captions[0]])])
        mask = positions < lengths[:, None]
        index = (self.offsets[captions][:, None] + positions) * mask
        scenes = captions // self.captions_per_scene
        latents = self.latents[scenes]
        return Example(
            latents=latents,
            text=self.states[index] * mask[:, :, None],
            mask=mask,
            weights=self.weights[scenes].tile(latents.shape[-1] // 4),
        )
