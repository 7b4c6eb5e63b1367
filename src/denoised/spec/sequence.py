"""How a denoiser's sequence is spread over ranks, as data: what is cut where, and where the whole is put together.

A plan is the spec's own, else one of `CLASSES`, else what the class of the library declares. Paths may have one `*`
for every entry of a list, `-1` for its last, and `:-1` for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoised import hf


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One tensor (or tuple of tensors) of which each rank keeps its piece.

    module: path of the module; "" is the denoiser itself.
    item: the name of its input, or the index of its output.
    dim: the dimension of the tokens.
    stream: the name under which attention knows these tokens; "" for what goes along with a stream (positions, masks),
        which is left whole where it has one entry for all tokens.
    num_dims: cut only a tensor of so many dimensions (a timestep may be per token or not); None: any.
    leading: cut only the first entries, those of this stream; what follows them is cut already.
    trailing: a number instead of a tensor: how many of the last tokens of this stream are of a kind.
    """

    module: str
    item: str | int
    dim: int = 1
    stream: str = ""
    num_dims: int | None = None
    leading: str = ""
    trailing: str = ""


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Where a stream becomes whole again: output `item` of a module. All streams end with the last gather."""

    module: str
    stream: str
    dim: int = 1
    item: int = 0


@dataclass(frozen=True, kw_only=True)
class Attends:
    """Attention modules that do not see all streams: whose tokens ask, and whose answer.

    Of several rules for one module the first is for its first call of attention, and so on.

    keys: None if every rank has them all, as of a text that is not cut.
    """

    modules: str
    queries: tuple[str, ...]
    keys: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """Attention is over all streams, side by side in order of their cuts, unless `attends` says otherwise.

    With a single stream, attention that is given other hidden states has its keys whole on every rank.

    outer_masks: the model writes a padding mask as its product with itself; what padding asks is of no consequence.
    cached_keys: a request may keep keys of a former forward, of other length, which come before those of this one.
    """

    cuts: tuple[Cut, ...]
    gathers: tuple[Gather, ...]
    attends: tuple[Attends, ...] = ()
    outer_masks: bool = False
    cached_keys: bool = False


IMAGE, TEXT = "hidden_states", "encoder_hidden_states"

_FLUX = SequencePlan(
    cuts=(
        Cut(module="", item=TEXT, stream=TEXT),
        Cut(module="", item=IMAGE, stream=IMAGE),
        Cut(module="", item="txt_ids", dim=0, num_dims=2),
        Cut(module="", item="img_ids", dim=0, num_dims=2),
    ),
    gathers=(Gather(module="proj_out", stream=IMAGE),),
)

_Z_IMAGE = SequencePlan(
    # The mask stays whole: attention takes from it what it needs.
    cuts=(
        Cut(module="layers.0", item="x", stream=IMAGE),
        Cut(module="layers.*", item="freqs_cis"),
        Cut(module="layers.*", item="noise_mask"),
    ),
    gathers=(Gather(module="layers.-1", stream=IMAGE),),
)

_SD3 = SequencePlan(
    cuts=(
        Cut(module="pos_embed", item=0, stream=IMAGE),
        Cut(module="context_embedder", item=0, stream=TEXT),
    ),
    gathers=(Gather(module="proj_out", stream=IMAGE),),
    attends=(Attends(modules="transformer_blocks.*.attn2", queries=(IMAGE,), keys=(IMAGE,)),),
)

_STABLE_AUDIO = SequencePlan(
    cuts=(
        Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="transformer_blocks.*", item="rotary_embedding", dim=0),
    ),
    gathers=(Gather(module="transformer_blocks.-1", stream=IMAGE),),
)

# The library's plan cuts the text too, whose keys cross-attention would then miss; a timestep may be per token.
_LTX = SequencePlan(
    cuts=(
        Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="transformer_blocks.*", item="temb"),
        Cut(module="rope", item=0),
        Cut(module="rope", item=1),
    ),
    gathers=(Gather(module="transformer_blocks.-1", stream=IMAGE),),
)

_PIXART = SequencePlan(
    cuts=(Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),),
    gathers=(Gather(module="transformer_blocks.-1", stream=IMAGE),),
)

_WAN_VACE = SequencePlan(
    # The control stream has the length of the video, is cut before it, and is only ever added to it.
    cuts=(
        Cut(module="rope", item=0),
        Cut(module="rope", item=1),
        Cut(module="vace_blocks.0", item=IMAGE),
        Cut(module="vace_blocks.0", item="control_hidden_states", stream=IMAGE),
        Cut(module="blocks.0", item=IMAGE, stream=IMAGE),
    ),
    gathers=(Gather(module="proj_out", stream=IMAGE),),
)

# Tokens come before rows in its blocks. The mask stays whole.
_ERNIE = SequencePlan(
    cuts=(
        Cut(module="layers.0", item="x", dim=0, stream=IMAGE),
        Cut(module="layers.*", item="rotary_pos_emb"),
        Cut(module="layers.*", item="temb", dim=0),
    ),
    gathers=(Gather(module="layers.-1", stream=IMAGE, dim=0),),
)

_HUNYUAN_VIDEO = SequencePlan(
    cuts=(
        Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="transformer_blocks.0", item=TEXT, stream=TEXT),
        Cut(module="transformer_blocks.*", item="attention_mask"),
        Cut(module="transformer_blocks.*", item="freqs_cis", dim=0),
    ),
    gathers=(Gather(module="proj_out", stream=IMAGE),),
    outer_masks=True,
)

_GLM = SequencePlan(
    cuts=(
        Cut(module="transformer_blocks.0", item=TEXT, stream=TEXT),
        Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="transformer_blocks.*", item="image_rotary_emb", dim=0),
    ),
    gathers=(Gather(module="proj_out", stream=IMAGE),),
    cached_keys=True,
)

_ALL_OF_HIDREAM = (IMAGE, "t5", "llama", "llama")

# Every block is given the text of another layer of Llama, behind that of T5 and of the last layer.
_HIDREAM = SequencePlan(
    cuts=(
        Cut(module="x_embedder", item=0, stream=IMAGE),
        Cut(module="caption_projection.-1", item=0, stream="t5"),
        Cut(module="caption_projection.:-1", item=0, stream="llama"),
        Cut(module="pe_embedder", item="ids", leading=IMAGE),
        Cut(module="double_stream_blocks.*", item="hidden_states_masks", leading=IMAGE),
        Cut(module="single_stream_blocks.*", item="hidden_states_masks", leading=IMAGE),
    ),
    gathers=(Gather(module="final_layer", stream=IMAGE),),
    attends=(Attends(modules="*", queries=_ALL_OF_HIDREAM, keys=_ALL_OF_HIDREAM),),
)

_AUDIO = "audio_hidden_states"


def _rotary(names: str) -> tuple[Cut, ...]:
    """Rotary embeddings of LTX-2: heads may be before the tokens (four dimensions) or among the channels (three)."""
    both = [(name, dims) for name in names.split() for dims in (3, 4)]
    return tuple(Cut(module="transformer_blocks.*", item=name, dim=dims - 2, num_dims=dims) for name, dims in both)


_LTX2 = SequencePlan(
    cuts=(
        Cut(module="transformer_blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="transformer_blocks.0", item=_AUDIO, stream=_AUDIO),
        *(
            Cut(module="transformer_blocks.*", item=name)
            for name in "temb temb_audio temb_ca_scale_shift temb_ca_audio_scale_shift temb_ca_gate "
            "temb_ca_audio_gate".split()
        ),
        *_rotary("video_rotary_emb audio_rotary_emb ca_video_rotary_emb ca_audio_rotary_emb"),
    ),
    gathers=(
        Gather(module="transformer_blocks.-1", stream=IMAGE),
        Gather(module="transformer_blocks.-1", stream=_AUDIO, item=1),
    ),
    attends=(
        Attends(modules="*.audio_attn1", queries=(_AUDIO,), keys=(_AUDIO,)),
        Attends(modules="*.audio_attn2", queries=(_AUDIO,), keys=None),
        Attends(modules="*.attn1", queries=(IMAGE,), keys=(IMAGE,)),
        Attends(modules="*.attn2", queries=(IMAGE,), keys=None),
        Attends(modules="*.audio_to_video_attn", queries=(IMAGE,), keys=(_AUDIO,)),
        Attends(modules="*.video_to_audio_attn", queries=(_AUDIO,), keys=(IMAGE,)),
    ),
)

# Its blocks tell history from the present by a number of tokens.
_HELIOS = SequencePlan(
    cuts=(
        Cut(module="blocks.0", item=IMAGE, stream=IMAGE),
        Cut(module="blocks.*", item="temb", num_dims=4),
        Cut(module="blocks.*", item="rotary_emb"),
        Cut(module="blocks.*", item="original_context_length", trailing=IMAGE),
    ),
    gathers=(Gather(module="blocks.-1", stream=IMAGE),),
)

# Two streams in each layer: text attends to itself, causally; then what is generated attends to both.
_COSMOS = SequencePlan(
    cuts=(
        Cut(module="layers.0", item="und_seq", dim=0, stream=TEXT),
        Cut(module="layers.0", item="gen_seq", dim=0, stream=IMAGE),
        Cut(module="layers.*", item="rotary_emb", dim=0),
    ),
    gathers=(
        Gather(module="layers.-1", stream=IMAGE, dim=0, item=1),
        Gather(module="layers.-1", stream=TEXT, dim=0, item=0),
    ),
    attends=(
        Attends(modules="*", queries=(TEXT,), keys=(TEXT,)),
        Attends(modules="*", queries=(IMAGE,), keys=(TEXT, IMAGE)),
    ),
)

# By class of denoiser: facts about diffusers 0.42, where it has no plan or one that does not work.
CLASSES: dict[str, SequencePlan] = {
    "Cosmos3OmniTransformer": _COSMOS,
    "ErnieImageTransformer2DModel": _ERNIE,
    "GlmImageTransformer2DModel": _GLM,
    "HeliosTransformer3DModel": _HELIOS,
    "HiDreamImageTransformer2DModel": _HIDREAM,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": _LTX,
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "PixArtTransformer2DModel": _PIXART,
    "SD3Transformer2DModel": _SD3,
    "StableAudioDiTModel": _STABLE_AUDIO,
    "WanVACETransformer3DModel": _WAN_VACE,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


def plan_of(model: Any, declared: SequencePlan | None) -> SequencePlan | None:
    """The plan of a pristine denoiser; None if there is none that works."""
    name = type(model).__name__
    if declared is not None or name in CLASSES:
        return declared or CLASSES[name]
    entries = hf.context_parallel_plan(model)
    return _from_library(entries) if entries else None


def _from_library(entries: list[hf.PlanEntry]) -> SequencePlan:
    """What the library declares, in our words: inputs that are hidden states are streams, all else goes along."""
    cuts = [
        Cut(module=e.module, item=e.item, dim=e.dim, num_dims=e.num_dims, stream=_stream(e.item))
        for e in entries
        if e.item is not None
    ]
    cuts.sort(key=lambda cut: cut.stream == IMAGE)  # text first, as these models put them side by side
    gathers = [Gather(module=e.module, stream=IMAGE, dim=e.dim) for e in entries if e.item is None]
    return SequencePlan(cuts=tuple(cuts), gathers=tuple(gathers))


def _stream(item: str | int | None) -> str:
    return item if isinstance(item, str) and item in (IMAGE, TEXT) else ""
