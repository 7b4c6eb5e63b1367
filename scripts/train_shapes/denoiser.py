"""Stage `denoiser`: trains the diffusion transformer on encoded scenes and captions, by flow matching.

Weights and activations are bfloat16, as they are served; the optimizer keeps a float32 master copy.
"""

import copy
import itertools
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from .config import Config, DenoiserTraining
from .data import Dataset, Example
from .loop import Checkpoint, Log, set_learning_rate

IMAGE_SHAPE = (1, 8, 8)  # frames, rows, columns of 2 x 2 patches of latents
TIME_SHIFT = 1.0  # none: layout and colours are decided above 0.7, the exact shapes below


def new_denoiser(settings: DenoiserTraining, *, latent_channels: int, text_size: int) -> QwenImageTransformer2DModel:
    quarter = settings.head_dim // 4
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=latent_channels * 4,
        out_channels=latent_channels,
        num_layers=settings.num_layers,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.num_heads,
        joint_attention_dim=text_size,
        axes_dims_rope=(quarter, quarter + quarter // 2, quarter + quarter // 2),
    )
    _initialize(model)
    return model


@torch.no_grad()
def _initialize(model: QwenImageTransformer2DModel) -> None:
    """Modulations and the output start at zero: each block begins as the identity (adaLN-zero)."""
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            modulation.weight.zero_()
            modulation.bias.zero_()
    for layer in (model.norm_out.linear, model.proj_out):
        layer.weight.zero_()
        layer.bias.zero_()


class Master(nn.Module):
    """Float32 parameters of the optimizer, and their running mean, next to the model that computes."""

    def __init__(self, model: QwenImageTransformer2DModel, ema_decay: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameter.detach().float() for parameter in model.parameters())
        self.mean = copy.deepcopy(self.weights).requires_grad_(False)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def take_gradients(self, model: nn.Module) -> None:
        for weight, parameter in zip(self.weights, model.parameters(), strict=True):
            if parameter.grad is not None:
                weight.grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def give_weights(self, model: nn.Module) -> None:
        for weight, parameter in zip(self.weights, model.parameters(), strict=True):
            parameter.copy_(weight)

    @torch.no_grad()
    def update_mean(self, step: int) -> None:
        """The first steps forget faster, so that early checkpoints are of use."""
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean), list(self.weights), 1 - decay)


def sample_times(count: int) -> Tensor:
    """A third uniform, the rest logit-normal; then shifted."""
    uniform, normal = torch.rand(count), torch.sigmoid(torch.randn(count) * 1.2)
    times = torch.where(torch.rand(count) < 1 / 3, uniform, normal)
    return TIME_SHIFT * times / (1 + (TIME_SHIFT - 1) * times)


def loss_of(model: QwenImageTransformer2DModel, example: Example) -> Tensor:
    clean = example.latents.float()
    noise, times = torch.randn_like(clean), sample_times(len(clean))
    mixed = torch.lerp(clean, noise, times[:, None, None])
    velocity = model(
        hidden_states=mixed.bfloat16(),
        encoder_hidden_states=example.text,
        encoder_hidden_states_mask=example.mask,
        timestep=times,
        img_shapes=[IMAGE_SHAPE] * len(clean),
        return_dict=False,
    )[0]
    return (example.weights * (velocity.float() - noise + clean).square()).mean()


def make_compilable(model: QwenImageTransformer2DModel) -> None:
    """Compiles the blocks, with two functions of the same results exchanged: complex numbers do not compile, and the
    backward pass of the fused attention takes twice the time of the plain one at 84 tokens on a CPU."""
    transformer_qwenimage.apply_rotary_emb_qwen = _rotate
    transformer_qwenimage.dispatch_attention_fn = _attend
    model.pos_embed.register_forward_hook(lambda *call: tuple(torch.view_as_real(part) for part in call[-1]))
    model.compile_repeated_blocks(dynamic=False)


def _rotate(x: Tensor, frequencies: Tensor, use_real: bool = False) -> Tensor:
    cosine, sine = frequencies[:, None].unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(3).type_as(x)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **unused: object) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.float().masked_fill(~attn_mask, -1e30).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2)


class Optimizers:
    """Muon for the matrices of attention and feed-forward, AdamW for all else. One call, one state."""

    def __init__(self, master: Master, model: QwenImageTransformer2DModel, settings: DenoiserTraining) -> None:
        names = [name for name, _ in model.named_parameters()]
        matrices = [".attn." in name or "_mlp." in name for name in names]
        rows = list(zip(master.weights, matrices, strict=True))
        hidden = [weight for weight, matrix in rows if matrix and weight.ndim == 2]
        other = [weight for weight, matrix in rows if not matrix or weight.ndim != 2]
        decay = settings.weight_decay
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(other, betas=(0.9, 0.98), weight_decay=decay, fused=True),
        )

    def step(self, rate: float) -> None:
        for part in self.parts:
            set_learning_rate(part, rate)
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])


class Trainer:
    """Model, optimizers and checkpoint; `step` sees one batch."""

    def __init__(self, config: Config) -> None:
        settings = config.denoiser
        self.model = new_denoiser(settings, latent_channels=config.vae.z_dim, text_size=config.text.hidden_size)
        self.master = Master(self.model, settings.ema_decay)
        self.optimizers = Optimizers(self.master, self.model, settings)
        parts = {"master": self.master, "optimizers": self.optimizers}
        self.checkpoint = Checkpoint(config.out / "denoiser.pt", parts)
        self.start = self.checkpoint.load()
        self.model.to(torch.bfloat16)
        self.master.give_weights(self.model)
        make_compilable(self.model)

    def step(self, step: int, rate: float, example: Example) -> float:
        loss = loss_of(self.model, example)
        loss.backward()
        self.master.take_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.master.weights.parameters(), 1.0)
        self.optimizers.step(rate)
        self.master.give_weights(self.model)
        self.master.update_mean(step)
        return loss.item()


def train_denoiser(config: Config) -> None:
    settings = config.denoiser
    torch.manual_seed(config.seed)
    data, trainer, log = Dataset(config), Trainer(config), Log(config.out / "denoiser.jsonl")
    batches = itertools.islice(data.batches(config.seed, settings.batch_size), trainer.start, settings.steps)
    losses = []
    for step, captions in enumerate(batches, start=trainer.start):
        rate, done = learning_rate(step, settings), step + 1
        losses.append(trainer.step(step, rate, data.example(captions)))
        if done % settings.log_every == 0:
            log.write(step=done, samples=done * settings.batch_size, loss=sum(losses) / len(losses), rate=rate)
            losses.clear()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            trainer.checkpoint.save(done)


def learning_rate(step: int, settings: DenoiserTraining) -> float:
    """Up, level, and down in a line."""
    left = (settings.steps - step) / (settings.steps * (1 - settings.level_until))
    return settings.learning_rate * min((step + 1) / settings.warmup_steps, 1.0, max(left, 0.02))
