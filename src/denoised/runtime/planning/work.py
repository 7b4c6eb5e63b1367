"""Operations and exchanges of a denoiser's layers, from their shapes and names: which sequence a layer reads.

Names say that where shapes cannot: `add_q_proj` reads the text, `norm1.linear` the timestep, `to_q` the picture or,
in blocks without layers of their own for the text, both. The rules are data; tests hold the sums against
FlopCounterMode on real forwards. It knows linear and convolutional layers and softmax attention; everything else
of a transformer is below a percent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from denoised.runtime.planning.facts import Denoiser, Tokens, Work
from denoised.runtime.planning.limits import limits
from denoised.spec.blocks import Stack, stacks
from denoised.spec.experts import EXPERTS, NUM_EXPERTS
from denoised.spec.model_spec import ModelSpec
from denoised.spec.tensor import MODULATIONS

# Words of a layer's path. What is computed from the timestep comes first: norm1_context.linear is no text.
ONCE = frozenset("time timestep mod modulation norm adaln guidance pooled global temb scale".split())
TEXT = frozenset("txt text context caption cap add encoder cross gen".split())
TEXT_SUFFIX = "t"  # to_q_t, ff_t
IMAGE_STACK = frozenset("noise img image siglip".split())
# Attentions that read their keys from the text, unless their block has layers for the text itself.
CROSS = frozenset("attn2 cross_attn audio_attn2".split())
# From one stream to the other: audio_to_video_attn asks for the video and reads the sound.
BETWEEN = re.compile(r"(\w+?)_to_(\w+?)_attn")
# In blocks with such layers the added ones are the picture's, and the others the text's.
GENERATED = "gen"
AUDIO = "audio"
# Last layers of attention and feed-forward: their sums over tensor ranks are all-reduced.
ROWWISE = tuple("to_out.0 to_out to_add_out to_out_t net.2 proj_out w2 linear_out linear_fc2 o_proj down_proj".split())
# Attention whose cost is linear in the length, by the name of its processor.
LINEAR_ATTENTION = "LinearAttn"
QUERIES = ("to_q", "q_proj", "to_qkv", "to_qkv_mlp_proj", "qkv")
# Norms inside an attention, and what they act on.
NORMS = {"norm_q": "queries", "norm_k": "keys", "q_norm": "queries", "k_norm": "keys"}
NORMS |= {"q_rms_norm": "queries", "k_rms_norm": "keys", "q_rms_norm_t": "text", "k_rms_norm_t": "text"}
NUM_EXCHANGES = 4  # queries, keys, values, and the answer


def words(path: str) -> frozenset[str]:
    """The words of a module's path: `norm1_context.linear` has norm, context and linear."""
    return frozenset(re.split(r"[._\d-]+", path.lower()))


def is_once(path: str) -> bool:
    return bool(words(path) & ONCE) or "t_embedder" in path and "text_embedder" not in path


def is_text(path: str) -> bool:
    return bool(words(path) & TEXT) or any(part.endswith(f"_{TEXT_SUFFIX}") for part in path.split("."))


def denoiser(name: str, model: Any, tokens: Tokens, spec: ModelSpec) -> Denoiser:
    """The facts of a transformer."""
    found = stacks(model, spec.stacks)
    inside = {id(block) for stack in found for block in stack.blocks}
    blocks = tuple(_block(stack, block, tokens) for stack in found for block in stack.blocks)
    heads = frozenset(count for stack in found for block in stack.blocks for count in _heads(block))
    rest = _rest(model, inside, tokens)
    return Denoiser(
        name=name,
        class_name=type(model).__name__,
        blocks=blocks,
        rest=rest,
        heads=heads,
        width=_width(found),
        limits=limits(model, spec),
    )


def _heads(block: Any) -> Iterator[int]:
    """Numbers of heads, of queries and of keys, that a block's attentions name."""
    for module in block.modules():
        if _query(module) is None:
            continue
        for attribute in ("heads", "num_heads", "n_heads"):
            if isinstance(getattr(module, attribute, None), int):
                yield getattr(module, attribute)
                inner, keys = getattr(module, "inner_dim", None), getattr(module, "inner_kv_dim", None)
                if isinstance(inner, int) and isinstance(keys, int) and keys != inner:
                    yield getattr(module, attribute) * keys // inner
                break


def _width(found: tuple[Stack, ...]) -> int:
    queries = (_query(module) for stack in found for block in stack.blocks for module in block.modules())
    return max((query.in_features for query in queries if query is not None), default=0)


def _query(module: Any) -> Any:
    """The layer that makes an attention's queries, if the module is an attention."""
    found = (getattr(module, name, None) for name in QUERIES)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)


def _block(stack: Stack, block: Any, tokens: Tokens) -> Work:
    layers = dict(_layers(block))
    if any(GENERATED in words(path) for path in layers):
        tokens = replace(tokens, image=tokens.text, text=tokens.image)
    double = any(is_text(path) and not is_once(path) for path in layers)
    cross = frozenset() if double else frozenset(path for path in _attentions(block) if _last(path) in CROSS)
    main = tokens.image if double or cross else _alone(stack.path, tokens)
    streams = _Streams(main=main, cross=cross, tokens=tokens)
    work = Work(whole_params=_params(block) - sum(_params(layer) for layer in layers.values()))
    for path, layer in layers.items():
        work += _layer(path, layer, block, streams.length(path), tokens.once)
    for path, module in _attentions(block).items():
        work += _attention(path, module, streams, joint=double and _has_text(module))
    for path, mixture in _mixtures(block):
        work += _mixture(mixture, streams.length(path))
    return work


def _alone(stack_path: str, tokens: Tokens) -> int:
    """The length in blocks that treat all that they see alike."""
    if words(stack_path) & TEXT:
        return tokens.text
    return tokens.image if words(stack_path) & IMAGE_STACK else tokens.image + tokens.text


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """Which sequence a block's layers read. main: the length of the block's own; cross: paths of its attentions
    that read keys from the text."""

    main: int
    cross: frozenset[str]
    tokens: Tokens

    def length(self, path: str) -> int:
        parent, _, last = path.rpartition(".")
        reads_keys = last in ("to_k", "to_v", "to_kv")
        between = BETWEEN.search(path)
        if between:
            return self._named(between[1] if reads_keys else between[2])
        if parent in self.cross and reads_keys:
            return self.tokens.text
        return self.tokens.text if is_text(path) else self._named("audio" if AUDIO in words(path) else "main")

    def _named(self, stream: str) -> int:
        return self.tokens.audio if stream == AUDIO else self.main

    def is_self(self, path: str) -> bool:
        """The attention reads its keys where it reads its queries."""
        return path not in self.cross and not BETWEEN.search(path)


def _has_text(attention: Any) -> bool:
    return any(is_text(name) for name, _ in attention.named_modules() if name)


def _attentions(block: Any) -> dict[str, Any]:
    return {path: module for path, module in block.named_modules() if _query(module) is not None}


def _layers(module: Any) -> Iterator[tuple[str, Any]]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, kinds))


def _layer(path: str, layer: Any, block: Any, length: int, once: int) -> Work:
    """One layer on `length` tokens; on `once`, if it reads the timestep."""
    operations = 2 * layer.weight.numel() * _share(path, block)
    if is_once(path):
        return Work(once_flops=operations * once) + _modulation(path, layer, once)
    if not isinstance(layer, nn.Linear):
        return Work(whole_params=_params(layer), token_flops=operations * length, widest=layer.out_channels)
    sums = path.endswith(ROWWISE)
    work = Work(
        divisible_params=_params(layer),
        token_flops=operations * length,
        widest=layer.out_features,
        reduced=length * layer.out_features * _share(path, block) if sums else 0,
        num_reduces=int(sums),
    )
    return work if mixture_of(path) is None else _of_expert(work)


def _of_expert(work: Work) -> Work:
    """The same, known as an expert's."""
    return replace(
        work,
        cut_experts=work.divisible_params,
        expert_reduced=work.reduced,
        expert_reduces=work.num_reduces,
    )


def _modulation(path: str, layer: Any, once: int) -> Work:
    """Weights of a layer that reads the timestep: tensor parallelism divides those that it knows by name."""
    if not f".{path}".endswith(_MODULATIONS):
        return Work(whole_params=_params(layer))
    return Work(divisible_params=_params(layer), gathered=once * layer.weight.shape[0], num_gathers=1)


_MODULATIONS = tuple(f".{name}" for name in MODULATIONS)


def _share(path: str, block: Any) -> float:
    """Which part of a block's experts a token visits; 1 for layers that are no expert's."""
    found = mixture_of(path)
    if found is None:
        return 1.0
    mixture = block.get_submodule(found)
    return _visits(mixture) / len(mixture.experts)


def mixture_of(path: str) -> str | None:
    """The path of the mixture that a layer is an expert's of."""
    found = re.match(rf"(?:(.*)\.)?{EXPERTS}\.\d+\.", path)
    return None if found is None else found[1] or ""


def _visits(mixture: Any) -> float:
    """Experts that a token goes to, on average where experts choose their tokens."""
    return float(getattr(mixture, "num_activated_experts", getattr(mixture, "capacity_factor", 1)))


def _mixtures(block: Any) -> Iterator[tuple[str, Any]]:
    return ((path, part) for path, part in block.named_modules() if getattr(part, EXPERTS, None) is not None)


def _mixture(mixture: Any, length: int) -> Work:
    """What goes to experts and comes back. Experts that are one module's parameters are counted here too, as no layer
    has them; their weights are among the block's own already."""
    experts = getattr(mixture, EXPERTS)
    params = 0 if isinstance(experts, nn.ModuleList) else _params(experts)
    widths = [layer.in_features for layer in mixture.modules() if isinstance(layer, nn.Linear)]
    width = min(widths, default=0)  # a router may read more than the stream
    each = params / max(getattr(experts, NUM_EXPERTS, 1), 1)
    routed = length * _visits(mixture)
    return Work(
        whole_experts=params,
        token_flops=2 * each * routed,
        mixed=length * width,
        num_mixtures=1,
        routed=routed * width,
    )


def _attention(path: str, module: Any, streams: _Streams, *, joint: bool) -> Work:
    text = streams.tokens.text if joint else 0
    lengths = {"queries": streams.length(f"{path}.to_q".lstrip(".")), "text": text}
    lengths["keys"] = streams.length(f"{path}.to_k".lstrip("."))
    queries, keys = lengths["queries"] + text, lengths["keys"] + text
    width = min(_query(module).out_features, _query(module).in_features)
    if LINEAR_ATTENTION in type(getattr(module, "processor", None)).__name__:
        keys = width // max(getattr(module, "heads", 1), 1) + 1
    flops = 4.0 * queries * keys * width
    own = streams.is_self(path)
    moved = NUM_EXCHANGES * queries * width if own else 0
    summed = [n for name, n in NORMS.items() if _spans_heads(getattr(module, name, None), width)]
    squares = [lengths[stream] for stream in summed]
    return Work(
        token_flops=flops,
        attention_flops=flops,
        exchanged=moved,
        num_attentions=int(own),
        num_reduces=len(squares),
        reduced=sum(squares),
    )


def _spans_heads(norm: Any, width: int) -> bool:
    """A norm over all heads, which needs the sum over ranks of each token's squares."""
    weight = getattr(norm, "weight", None)
    return weight is not None and weight.numel() == width


def _rest(model: Any, inside: set[int], tokens: Tokens) -> Work:
    """All outside the blocks; a layer reads the picture unless its name says otherwise. Only modulations are cut."""
    within = {id(part) for block in model.modules() if id(block) in inside for part in block.modules()}
    work = Work(whole_params=_params(model) - sum(_params(b) for b in model.modules() if id(b) in inside))
    streams = _Streams(main=tokens.image, cross=frozenset(), tokens=tokens)
    for path, layer in _layers(model):
        if id(layer) not in within:
            length = tokens.once if is_once(path) else streams.length(path)
            cut = _modulation(path, layer, tokens.once)
            work += replace(cut, whole_params=-cut.divisible_params, once_flops=2.0 * layer.weight.numel() * length)
    return work


def _params(module: Any) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def _last(path: str) -> str:
    return path.rpartition(".")[2]
