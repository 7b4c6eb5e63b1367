"""What tensor parallelism knows of models: names of layers and of numbers, and how a weight is cut. Data only.

The names are the conventions of diffusers and transformers. A class that declares a plan of its own
(`hf.declared_cuts`) needs the names of numbers and norms alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

# column: outputs are divided. row: inputs are divided, outputs are sums over ranks. gathered: outputs are divided
# and put together again at once. table: a table with a column for each head. norm: a norm over all heads.
Role = Literal["column", "row", "gathered", "table", "norm"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How a weight was cut; on a layer it is found as `denoised_shard`.

    dim: the dimension of the weight that is cut.
    sizes: lengths of the parts of the whole weight along `dim`; each is cut on its own (q, k, v of a packed layer).
    copies: so many neighbouring ranks hold the same slice, for key heads that are fewer than the ranks.
    """

    role: Role
    dim: int
    sizes: tuple[int, ...]
    degree: int
    rank: int
    copies: int = 1

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Start and length, along the whole dimension, of each piece that this rank holds."""
        start = 0
        for size in self.sizes:
            length = size * self.copies // self.degree
            yield start + self.rank // self.copies * length, length
            start += size

    def take(self, whole: Any, dim: int | None = None) -> Any:
        """This rank's piece, a copy, of a tensor that has the whole length along `dim` (by default the weight's)."""
        import torch

        dim = self.dim if dim is None else dim
        return torch.cat([whole.narrow(dim, start, length) for start, length in self.ranges()], dim=dim)

    @property
    def length(self) -> int:
        """What this rank holds along the dimension."""
        return sum(length for _, length in self.ranges())


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer that is cut: its path in the model; `part` names, for an error, what has to be divisible."""

    path: str
    role: Role
    dim: int
    sizes: tuple[int, ...]
    part: str
    copied: bool = False


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module and its heads; `scales`: its parameters that have a number for each head."""

    path: str
    heads: int
    key_heads: int
    width: int  # of all heads' queries
    scales: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is cut in one model."""

    layers: tuple[Layer, ...]
    attentions: tuple[Attention, ...]


@dataclass(frozen=True, kw_only=True)
class Feedforward:
    """Names of one feed-forward's layers, from the module that has them all.

    attention: the attention whose output stands before the hidden state in the row layer's input.
    """

    columns: tuple[str, ...]
    row: str
    attention: str | None = None


# Names inside an attention module.
QUERIES = ("to_q", "add_q_proj", "to_q_t", "q_proj", "q")
KEYS = (
    *("to_k", "to_v", "add_k_proj", "add_v_proj", "to_k_t", "to_v_t"),
    *("k_proj", "v_proj", "k", "v"),
)
GATES = ("to_gate_logits",)  # one output a head
PACKED = ("to_qkv_mlp_proj",)  # only where the class declares the parts
ROWS = ("to_out.0", "to_out", "to_add_out", "to_out_t", "o_proj", "out_proj", "o")
TABLES = ("relative_attention_bias",)
NORMS = (
    *("norm_q", "norm_k", "norm_added_q", "norm_added_k", "q_norm", "k_norm"),
    *("q_rms_norm", "k_rms_norm", "q_rms_norm_t", "k_rms_norm_t", "k_norm_und_for_gen"),
)
SCALES = ("history_key_scale",)
INPUTS = ("group_norm", "norm_cross")  # act on what comes in, which is whole

FEEDFORWARDS = (
    Feedforward(columns=("net.0.proj",), row="net.2"),
    Feedforward(columns=("w1", "w3"), row="w2"),
    Feedforward(columns=("gate_proj", "up_proj"), row="down_proj"),
    Feedforward(columns=("gate_proj", "up_proj"), row="linear_fc2"),
    Feedforward(columns=("linear_in",), row="linear_out"),
    Feedforward(columns=("wi_0", "wi_1"), row="wo"),
    Feedforward(columns=("wi",), row="wo"),
    Feedforward(columns=("fc1",), row="fc2"),
    Feedforward(columns=("conv_inverted", "conv_depth"), row="conv_point"),
    Feedforward(columns=("proj_mlp",), row="proj_out", attention="attn"),
)

# Layers that make shifts, scales and gates out of the time: few rows, much weight. The last parts of their paths.
MODULATIONS = (
    *("img_mod.1", "txt_mod.1", "norm1.linear", "norm1_context.linear", "norm.linear"),
    *("adaLN_modulation.0", "adaLN_modulation.1", "double_stream_modulation_img.linear"),
    *("double_stream_modulation_txt.linear", "single_stream_modulation.linear", "time_embed.linear", "time_proj"),
    *("adaln_single.linear",),
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What layers of a model are called: the usual names, and those that its spec adds (`ModelSpec.tensor_names`)."""

    queries: tuple[str, ...] = QUERIES
    keys: tuple[str, ...] = KEYS
    gates: tuple[str, ...] = GATES
    packed: tuple[str, ...] = PACKED
    rows: tuple[str, ...] = ROWS
    tables: tuple[str, ...] = TABLES
    norms: tuple[str, ...] = NORMS
    inputs: tuple[str, ...] = INPUTS
    feedforwards: tuple[Feedforward, ...] = FEEDFORWARDS
    modulations: tuple[str, ...] = MODULATIONS


def vocabulary(own: Mapping[str, str]) -> Vocabulary:
    """The usual names, and beside them a model's own. own: from its name to the usual one of a layer of that use.

    Raises:
        ValueError: no layer is usually called that.
    """
    usual = Vocabulary()
    kinds = {field.name: getattr(usual, field.name) for field in fields(usual) if field.name != "feedforwards"}
    of_feedforwards = {name for f in FEEDFORWARDS for name in (*f.columns, f.row)}
    unknown = set(own.values()) - of_feedforwards - {name for kind in kinds.values() for name in kind}
    if unknown:
        raise ValueError(f"tensor_names: no layer is usually called {', '.join(sorted(unknown))}")
    more = {kind: (*known, *(name for name, of in own.items() if of in known)) for kind, known in kinds.items()}
    return Vocabulary(**more, feedforwards=(*FEEDFORWARDS, *_renamed(own)))


def _renamed(own: Mapping[str, str]) -> Iterator[Feedforward]:
    """Feed-forwards with the names that a model has for some of their layers."""
    named = {usual: name for name, usual in own.items()}
    for f in FEEDFORWARDS:
        other = replace(f, columns=tuple(named.get(name, name) for name in f.columns), row=named.get(f.row, f.row))
        if other != f:
            yield other


# Numbers on an attention module that processors compute with.
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "sliceable_head_dim")
HEAD_WIDTH = ("head_dim",)
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
GROUPS = ("num_key_value_groups",)
WIDTHS = ("inner_dim",)
KEY_WIDTHS = ("inner_kv_dim", "kv_inner_dim")
HIDDEN_WIDTHS = ("mlp_hidden_dim",)  # of a feed-forward, on the module that holds its layers

# Numbers on a layer that follow from the shape of its weight, by dimension of the weight.
SIZES: dict[int, tuple[str, ...]] = {0: ("out_features", "out_channels"), 1: ("in_features", "in_channels")}

# Arguments of an attention call that may hold rotary tables over all heads, and how a module says that its tables
# are (batch, head, token, half of a head) and not (..., all heads side by side).
ROTARY = ("image_rotary_emb", "query_rotary_emb", "key_rotary_emb")
SPLIT_ROTARY = ("rope_type", "split")
