"""Reading off a pristine model what tensor parallelism cuts: what its class declares, else what its layers are called.

Nothing is changed here. What would be cut only in part, or holds weights of unknown meaning, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from denoised.hf import declared_cuts
from denoised.spec import tensor as names
from denoised.spec.experts import DEALT
from denoised.spec.tensor import Attention, Feedforward, Layer, Plan, Vocabulary

# A model of whose matrices less than this share would be divided gains nothing worth its exchanges.
SMALLEST_SHARE = 0.25


class UnknownLayerError(Exception):
    """A layer that would have to be divided, by its path, whose meaning the names do not tell."""


HEADS, CHANNELS = "heads", "feed-forward channels"


def read(model: nn.Module, words: Vocabulary) -> Plan:
    """The plan of a model; `words`: what its layers are called. Raises UnknownLayerError."""
    declared = _declared(model)
    attentions = tuple(_attentions(model, declared, words))
    layers = {
        layer.path: layer for attention in attentions for layer in _of_attention(model, attention, declared, words)
    }
    others = declared.values() if declared else _feedforwards(model, words)
    layers = {layer.path: layer for layer in others} | layers
    _check_outputs(attentions, layers, words)
    if layers:
        layers = {layer.path: layer for layer in _modulations(model, words)} | layers
    whole = {id(part) for part in _dealt(model)}
    kept = (layer for layer in layers.values() if id(model.get_submodule(layer.path)) not in whole)
    return Plan(layers=tuple(kept), attentions=attentions)


def _dealt(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights are shared out to ranks already, each of them whole."""
    return [part for module in model.modules() if hasattr(module, DEALT) for part in module.modules()]


def share(model: nn.Module, plan: Plan) -> float:
    """How much is divided of the matrices of blocks, which are what stands in lists of modules."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = {id(layer): layer for blocks in lists for layer in blocks.modules()}
    divided = {id(model.get_submodule(layer.path)) for layer in plan.layers} | {id(part) for part in _dealt(model)}
    sizes = {key: w.numel() for key, layer in blocks.items() if (w := weight(layer)) is not None and w.ndim > 1}
    return sum(size for key, size in sizes.items() if key in divided) / max(sum(sizes.values()), 1)


def weight(layer: nn.Module) -> nn.Parameter | None:
    found = getattr(layer, "weight", None)
    return found if isinstance(found, nn.Parameter) else None


def number(module: nn.Module, choices: Iterable[str]) -> int | None:
    """The first of these attributes that is a whole number; entries of a model's configuration do not count."""
    found = (vars(module).get(name) for name in choices)
    return next((value for value in found if isinstance(value, int)), None)


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The layer at a path below a module, if there is one."""
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def _declared(model: nn.Module) -> dict[str, Layer]:
    roles: tuple[names.Role, names.Role] = ("column", "row")
    return {
        path: Layer(path=path, role=roles[dim], dim=dim, sizes=sizes, part=CHANNELS)
        for path, (dim, sizes) in declared_cuts(model).items()
    }


def _attentions(model: nn.Module, declared: dict[str, Layer], words: Vocabulary) -> Iterator[Attention]:
    for path, module in model.named_modules():
        query = _first(module, words.queries)
        heads = _num_heads(module, query)
        packed = next((f"{path}.{name}" for name in words.packed if f"{path}.{name}" in declared), None)
        if heads and packed:
            yield Attention(path=path, heads=heads, key_heads=heads, width=declared[packed].sizes[0])
        elif heads and query is not None and (not declared or f"{path}.{query[0]}" in declared):
            yield _attention(path, module, heads, _outputs(query[1]), words)


def _num_heads(module: nn.Module, query: tuple[str, nn.Module] | None) -> int | None:
    """What an attention says, or follows from the width of a head; None for a module that is none."""
    head = number(module, names.HEAD_WIDTH)
    by_width = _outputs(query[1]) // head if query is not None and head else None
    return number(module, names.HEADS) or by_width


def _attention(path: str, module: nn.Module, heads: int, width: int, words: Vocabulary) -> Attention:
    key = _first(module, words.keys)
    by_width = heads if key is None else _outputs(key[1]) * heads // width
    key_heads = number(module, names.KEY_HEADS) or by_width
    scales = tuple(_scales(path, module, heads))
    return Attention(path=path, heads=heads, key_heads=key_heads, width=width, scales=scales)


def _scales(path: str, module: nn.Module, heads: int) -> Iterator[str]:
    """Parameters of the attention itself that have a number for each head; one number for all heads stays."""
    for name, parameter in module.named_parameters(recurse=False):
        if name not in names.SCALES or parameter.shape not in ((1,), (heads,)):
            raise UnknownLayerError(f"{path}.{name}")
        if parameter.shape == (heads,):
            yield name


def _first(module: nn.Module, choices: Iterable[str]) -> tuple[str, nn.Module] | None:
    """Name and layer of the first of these children that has a weight."""
    found = ((name, child(module, name)) for name in choices)
    return next(((name, layer) for name, layer in found if layer is not None and weight(layer) is not None), None)


def _outputs(layer: nn.Module) -> int:
    matrix = weight(layer)
    assert matrix is not None
    return matrix.shape[0]


def _of_attention(
    model: nn.Module, attention: Attention, declared: dict[str, Layer], words: Vocabulary
) -> Iterator[Layer]:
    """Every layer inside an attention that is cut; one of unknown meaning is refused."""
    module = model.get_submodule(attention.path)
    for name, layer in module.named_modules():
        path = f"{attention.path}.{name}"
        if layer is module:
            continue
        if name in words.norms:
            yield from _norm(attention, path, layer)
        elif path in declared:
            yield _declared_layer(declared[path], name, words)
        elif any(True for _ in layer.parameters(recurse=False)) and name not in words.inputs:
            yield _named_layer(path, name, layer, words)


def _declared_layer(layer: Layer, name: str, words: Vocabulary) -> Layer:
    part = CHANNELS if name in words.packed or layer.role == "row" else HEADS
    return Layer(
        path=layer.path,
        role=layer.role,
        dim=layer.dim,
        sizes=layer.sizes,
        part=part,
        copied=name in words.keys,
    )


def _named_layer(path: str, name: str, layer: nn.Module, words: Vocabulary) -> Layer:
    matrix = weight(layer)
    columns = (*words.queries, *words.keys, *words.gates)
    roles: dict[str, tuple[names.Role, int]] = {
        **dict.fromkeys(columns, ("column", 0)),
        **dict.fromkeys(words.rows, ("row", 1)),
        **dict.fromkeys(words.tables, ("table", 1)),
    }
    if matrix is None or name not in roles:
        raise UnknownLayerError(path)
    role, dim = roles[name]
    return Layer(path=path, role=role, dim=dim, sizes=(matrix.shape[dim],), part=HEADS, copied=name in words.keys)


def _norm(attention: Attention, path: str, norm: nn.Module) -> Iterator[Layer]:
    """A norm of single heads stays whole; one over all heads is cut."""
    width, head = _norm_width(norm), attention.width // attention.heads
    if width == head or type(norm) is nn.Identity:
        return
    over_all = width in (attention.width, attention.key_heads * head)
    if width is None or weight(norm) is None or not over_all or "RMS" not in type(norm).__name__:
        raise UnknownLayerError(path)
    yield Layer(path=path, role="norm", dim=0, sizes=(width,), part=HEADS, copied=width != attention.width)


def _norm_width(norm: nn.Module) -> int | None:
    """How many numbers a norm takes together; norms without weights say it as PyTorch's or diffusers' do."""
    matrix = weight(norm)
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None)) if matrix is None else matrix.shape
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def _feedforwards(model: nn.Module, words: Vocabulary) -> Iterator[Layer]:
    for path, module in model.named_modules():
        for feedforward in words.feedforwards:
            yield from _feedforward(path, module, feedforward, words)


def _feedforward(path: str, module: nn.Module, feedforward: Feedforward, words: Vocabulary) -> Iterator[Layer]:
    row = _first(module, (feedforward.row,))
    columns = [found for name in feedforward.columns if (found := _first(module, (name,))) is not None]
    if row is None or len(columns) != len(feedforward.columns):
        return
    matrix = weight(row[1])
    assert matrix is not None
    before = _attention_width(module, feedforward, words)
    hidden = matrix.shape[1] - before
    if not before and hidden != matrix.shape[0] and (norm := _norm_over(module, hidden)):
        raise UnknownLayerError(f"{path}.{norm}")
    for name, layer in columns:
        if hidden <= 0 or _outputs(layer) % hidden:
            raise UnknownLayerError(f"{path}.{name}")
        sizes = (hidden,) * (_outputs(layer) // hidden)
        yield Layer(path=f"{path}.{name}", role="column", dim=0, sizes=sizes, part=CHANNELS)
    yield Layer(
        path=f"{path}.{row[0]}", role="row", dim=1, sizes=(before, hidden) if before else (hidden,), part=CHANNELS
    )


def _norm_over(module: nn.Module, width: int) -> str | None:
    """A norm over the hidden state would need the hidden state whole."""
    norms = (name for name, part in module.named_modules() if "Norm" in type(part).__name__)
    return next((name for name in norms if _norm_width(module.get_submodule(name)) == width), None)


def _attention_width(module: nn.Module, feedforward: Feedforward, words: Vocabulary) -> int:
    attention = None if feedforward.attention is None else child(module, feedforward.attention)
    query = None if attention is None else _first(attention, words.queries)
    return 0 if query is None else _outputs(query[1])


def _check_outputs(attentions: tuple[Attention, ...], layers: dict[str, Layer], words: Vocabulary) -> None:
    """A divided attention's output goes into a row layer: its own, or the one of the block that it stands in."""
    rows = [path for path, layer in layers.items() if layer.role == "row"]
    for attention in attentions:
        block = attention.path.rpartition(".")[0]
        outer = [f"{block}.{f.row}" for f in words.feedforwards if f.attention == attention.path.rpartition(".")[2]]
        if not any(row.startswith(f"{attention.path}.") or row in outer for row in rows):
            raise UnknownLayerError(attention.path)


def _modulations(model: nn.Module, words: Vocabulary) -> Iterator[Layer]:
    endings = tuple(f".{name}" for name in words.modulations)
    for path, layer in model.named_modules():
        matrix = weight(layer)
        if matrix is not None and matrix.ndim == 2 and f".{path}".endswith(endings):
            yield Layer(path=path, role="gathered", dim=0, sizes=(matrix.shape[0],), part="modulation channels")
