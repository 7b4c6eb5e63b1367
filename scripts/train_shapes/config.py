"""All settings of the training run. Sizes of the model, lengths of the stages; one frozen dataclass per stage."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class VaeTraining:
    base_dim: int = 16
    z_dim: int = 16
    joint_steps: int = 2_800  # encoder and decoder; the encoder is final after them
    decoder_steps: int = 5_200  # the decoder alone, while latents can already be encoded
    whole_steps: int = 600  # the last of these, on whole pictures
    batch_size: int = 8
    crop: int = 64
    learning_rate: float = 6e-4
    edge_weight: float = 0.5
    kl_weight: float = 1e-4
    checkpoint_every: int = 400

    @property
    def steps(self) -> int:
        return self.joint_steps + self.decoder_steps


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    vocab_size: int = 1200
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 3
    steps: int = 2200
    batch_size: int = 64
    learning_rate: float = 2e-3
    checkpoint_every: int = 200


@dataclass(frozen=True, kw_only=True)
class DataStage:
    num_scenes: int = 61_440
    captions_per_scene: int = 3
    shard_scenes: int = 4_096


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    num_layers: int = 5
    num_heads: int = 4
    head_dim: int = 64
    steps: int = 8_600
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    level_until: float = 0.81  # share of the steps before the learning rate goes down
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    log_every: int = 10
    checkpoint_every: int = 250


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    seed: int = 0
    vae: VaeTraining = field(default_factory=VaeTraining)
    text: TextTraining = field(default_factory=TextTraining)
    data: DataStage = field(default_factory=DataStage)
    denoiser: DenoiserTraining = field(default_factory=DenoiserTraining)
