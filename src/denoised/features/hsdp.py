"""Weights sharded over ranks, a group of parameters per block: gathered while the block's forward runs, then freed.

FSDP2 does the sharding and the gathering. It acts in hooks of `__call__`, but a trap, a cache or a pipeline stage
stands in `forward` and decides there whether anything runs. So each group has a keeper, a module outside of the model
that FSDP2 hooks into, and the block's own `forward` goes through its keeper; the model keeps its classes and names.

What is no block (embeddings, norms, heads) is one group, gathered while any part of the model runs, also by a method
other than the model's forward. Knows nothing of models: what a block is, it reads off the lists of modules.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from denoised.errors import InvalidConfigError
from denoised.spec.blocks import SMALLEST_SHARE
from denoised.spec.model_spec import ModelSpec
from denoised.steps import collectives
from denoised.steps.collectives import Group
from denoised.steps.tally import count


class _Keeper(nn.Module):
    """What FSDP2 hooks into for one group: the parameters of `module` that are in none of the groups below it."""

    def __init__(self, module: nn.Module, below: tuple[_Keeper, ...] = ()) -> None:
        super().__init__()
        self.below = nn.ModuleList(below)  # before `module`: FSDP2 must meet the blocks by their keepers first
        self.module = module
        self.open = False
        others = self.others()
        self.names = [name for name, parameter in module.named_parameters() if parameter not in others]

    def forward(self, run: Callable[[], Any]) -> Any:
        """`run` has its arguments inside, because FSDP2 would copy lists and dicts among them to move tensors."""
        if self.names:
            assert not isinstance(self.module.get_parameter(self.names[0]), DTensor), "weights are not gathered"
            count("hsdp_all_gather")
        return run()

    def others(self) -> set[nn.Parameter]:
        """Parameters of groups below, of other pipeline stages (on meta), and scalars, which FSDP2 cannot shard."""
        kept = {parameter for parameter in self.module.parameters() if not parameter.ndim or parameter.is_meta}
        return kept | {parameter for keeper in self.below for parameter in keeper.parameters()}


class Gathers:
    """The gathers of the blocks of one model, for whoever stands in for a block."""

    def __init__(self, keepers: tuple[_Keeper, ...]) -> None:
        self._keepers = keepers

    def attend(self, block: nn.Module) -> Callable[[], None]:
        """Takes part in the gathers of a block that other ranks run. Only inside a forward of the model."""
        inside = {id(part) for part in block.modules()}
        keepers = [keeper for keeper in self._keepers if id(keeper.module) in inside]

        def attend() -> None:
            for keeper in keepers:
                _gathered(keeper, lambda: None)

        return attend

    def around(self, block: nn.Module) -> Callable[[Callable[[], Any]], Any]:
        """Runs something with the block's weights, as the block itself would."""
        own = next((keeper for keeper in self._keepers if keeper.module is block), None)
        return (lambda run: run()) if own is None else functools.partial(_gathered, own)


def apply(
    model: nn.Module,
    spec: ModelSpec | None,
    mesh: DeviceMesh,
    fill: Callable[[nn.Module], None] = lambda module: None,
) -> Gathers:
    """Shard `model`'s weights in place, for inference; gives who gathers them.

    Args:
        spec: not asked: blocks may be gathered in any order.
        mesh: (shard,) or (replicate, shard).
        fill: reads a module's weights, if they are not there yet. Only one block at a time is held whole.

    Raises:
        InvalidConfigError: there is nothing to shard, or nobody to share it with.
    """
    check(model, mesh)
    keepers = tuple(_Keeper(block) for block in _blocks(model))
    rest = _Keeper(model, keepers)
    for keeper in (*keepers, rest):
        fill(keeper.module)
        _prepare(keeper.module)
        _shard(keeper, mesh)
    rest(lambda: None)  # FSDP2 finds out now, not in a request, which groups there are and who is outermost
    _reroute(keepers, rest)
    return Gathers(keepers)


def _reroute(keepers: tuple[_Keeper, ...], rest: _Keeper) -> None:
    """Let every forward find its weights gathered, whoever calls it."""
    inside = {id(part) for keeper in keepers for part in keeper.module.modules()}
    for keeper in keepers:
        _route(keeper.module, functools.partial(_gathered, keeper))
    for part in [part for part in rest.module.modules() if id(part) not in inside and _runs(part)]:
        _route(part, functools.partial(_opened, rest))


def check(model: nn.Module, mesh: DeviceMesh) -> None:
    """What `apply` refuses, with nothing changed and no weight read. Raises InvalidConfigError."""
    name, ranks = type(model).__name__, mesh.size(mesh.ndim - 1)
    if mesh.ndim > 2 or ranks < 2:
        raise InvalidConfigError(
            f"hsdp_shard_size={ranks}: one rank has nobody to share the weights of {name} with; "
            "use at least 2, or use_hsdp=False."
        )
    weights, buffers = _bytes(model.parameters()), _bytes(model.buffers())
    if not weights + buffers:
        raise InvalidConfigError(f"use_hsdp=True: {name} has no weights to shard; leave it out.")
    if weights <= buffers:
        raise InvalidConfigError(
            f"use_hsdp=True: {name} holds {buffers} of its {weights + buffers} bytes in buffers, which cannot be "
            "sharded; use tensor_parallel_size, or load it without quantization."
        )


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _prepare(model: nn.Module) -> None:
    """What FSDP2 asks of parameters. Without gradients it also takes several dtypes in one group."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that become groups: entries of the outermost lists that hold a share of the weights worth it.

    A block whose weights are tied to a tensor outside of it stays with the rest, where both names are one tensor; the
    block of another pipeline stage has no weights here.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    worth = [part for part in _lists(model) if sum(p.numel() for p in part.parameters()) >= SMALLEST_SHARE * total]
    uses = _uses(model)
    here = (block for part in worth for block in part.children() if not _is_elsewhere(block))
    unique = {id(block): block for block in here}.values()
    return [block for block in unique if _uses(block) and all(uses[key] == n for key, n in _uses(block).items())]


def _is_elsewhere(block: nn.Module) -> bool:
    """Whether all its weights are another rank's; a block without some of its experts is here."""
    return all(parameter.is_meta for parameter in block.parameters())


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of modules that are called; a list of lists is looked into."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(_runs(entry) for entry in child):
            yield child
        else:
            yield from _lists(child)


def _uses(module: nn.Module) -> Counter[int]:
    """How many names each parameter has."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward of its own; containers do not."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


class _Gather:
    """How a group's weights come together on a CPU: FSDP2 itself would send messages, also within one machine."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Group, async_op: bool = False
    ) -> dist.Work | None:
        collectives.gather_into(output_tensor, input_tensor, group)
        return None


def _shard(keeper: _Keeper, mesh: DeviceMesh) -> None:
    sharded = fully_shard(
        keeper,
        mesh=mesh,
        reshard_after_forward=True,
        shard_placement_fn=functools.partial(_placement, num_shards=mesh.size(mesh.ndim - 1)),
        ignored_params=keeper.others(),
    )
    if mesh.device_type == "cpu":
        sharded.set_custom_all_gather(_Gather())  # type: ignore[arg-type]


def _placement(parameter: nn.Parameter, *, num_shards: int) -> Shard:
    """The first dim that divides evenly: a table with one row would else lie on one rank whole."""
    even = (dim for dim, length in enumerate(parameter.shape) if length % num_shards == 0)
    return Shard(next(even, 0))


def _route(module: nn.Module, way: Callable[[Callable[[], Any]], Any]) -> None:
    """Let the module's forward go by `way`; its signature still shows."""
    forward = module.forward

    @functools.wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return way(functools.partial(forward, *args, **kwargs))

    module.__dict__["forward"] = routed


def _gathered(keeper: _Keeper, run: Callable[[], Any]) -> Any:
    """`run` with the group's weights. They are freed if it is given up, too: ranks must gather equally often."""
    try:
        return keeper(run)
    except BaseException:
        assert isinstance(keeper, FSDPModule)
        keeper.reshard()
        raise


def _opened(rest: _Keeper, run: Callable[[], Any]) -> Any:
    """Gather what is no block, unless a part further out has. After an error, FSDP2 must forget where it was."""
    if rest.open:
        return run()
    rest.open = True
    try:
        with torch.no_grad():
            return rest(run)
    except BaseException:
        assert isinstance(rest, FSDPModule)
        rest.reset_iter_state()
        raise
    finally:
        rest.open = False
