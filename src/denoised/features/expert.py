"""Expert parallelism: each expert of a mixture lives on one rank, whole, and tokens come to it.

Ranks along the tensor axis have the same tokens: each computes what its own experts add, and the sums are summed over
ranks. Ranks along the sequence axes have tokens of their own: these travel to the expert's rank and back. Where both
axes are there, experts are dealt over both, and tokens travel among the sequence ranks of each tensor rank.

Routers, shared experts and all other layers are not touched. Applied before tensor parallelism, which must find which
matrices are dealt (`spec.experts.DEALT`). Which blocks are mixtures, `spec/experts.py` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.spec.experts import DEALT, EXPERTS, NUM_EXPERTS, ROUTED
from denoised.spec.model_spec import ModelSpec
from denoised.steps.collectives import all_gather, all_reduce, all_to_all
from denoised.steps.tally import count

Group = dist.ProcessGroup
FIELD = "enable_expert_parallel=True"


def apply(model: nn.Module, spec: ModelSpec, *, tensor: Group, sequence: Group) -> None:
    """Deal the experts of a denoiser, in place. All ranks of both groups hold the same whole weights before.

    Args:
        spec: not asked: mixtures are recognized by their structure.
        tensor: ranks that have the same tokens in every forward.
        sequence: ranks that each have some of the tokens.

    Raises:
        InvalidConfigError: there are no experts, too few of them, or they are called in a way that is not known.
    """
    mixtures = list(_mixtures(model))
    _check(type(model).__name__, mixtures, tensor, sequence)
    for block in mixtures:
        experts = block.get_submodule(EXPERTS)
        if isinstance(experts, nn.ModuleList):
            setattr(block, ROUTED, _Routed(experts, tensor, sequence))
        else:
            experts.forward = _Packed(experts, tensor)
        setattr(experts, DEALT, True)


def _mixtures(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks with several experts."""
    for module in model.modules():
        experts = module._modules.get(EXPERTS)
        if experts is not None and _num_experts(experts) > 1:
            yield module


def _num_experts(experts: nn.Module) -> int:
    return len(experts) if isinstance(experts, nn.ModuleList) else int(getattr(experts, NUM_EXPERTS, 0))


def _check(name: str, mixtures: list[nn.Module], tensor: Group, sequence: Group) -> None:
    if not mixtures:
        raise InvalidConfigError(f"{FIELD}: {name} has no mixture-of-experts blocks; leave it off.")
    ranks = tensor.size() * sequence.size()
    if ranks == 1:
        raise InvalidConfigError(
            f"{FIELD}: one rank has nobody to deal the experts of {name} to; raise tensor_parallel_size, "
            "ulysses_degree or ring_degree."
        )
    fewest = min(_num_experts(block.get_submodule(EXPERTS)) for block in mixtures)
    if ranks > fewest:
        raise InvalidConfigError(
            f"{FIELD}: {name} has {fewest} experts a block for {ranks} ranks; make tensor_parallel_size x "
            f"ulysses_degree x ring_degree at most {fewest}."
        )
    for block in mixtures:
        _check_form(name, block, sequence)


def _check_form(name: str, block: nn.Module, sequence: Group) -> None:
    experts = block.get_submodule(EXPERTS)
    listed = isinstance(experts, nn.ModuleList)
    packed = all(len(p) == _num_experts(experts) for p in experts.parameters()) and not any(experts.children())
    if not (callable(getattr(block, ROUTED, None)) if listed else packed):
        raise InvalidConfigError(
            f"{FIELD}: how {name} calls the experts of {type(block).__name__} is not known; leave it off."
        )
    if packed and not listed and sequence.size() > 1:
        raise InvalidConfigError(
            f"{FIELD}: the experts of {name} choose among all tokens, of which no sequence rank has all; "
            "use tensor_parallel_size with ulysses_degree=1 and ring_degree=1."
        )


class _Routed:
    """Stands in for a block's loop over a list of experts.

    Experts are numbered anew, by "places", so that those of one rank are neighbours: rank r, which is tensor rank x
    number of sequence ranks + sequence rank, has every expert e with e % ranks = r.
    """

    def __init__(self, experts: nn.ModuleList, tensor: Group, sequence: Group) -> None:
        self.tensor, self.sequence = tensor, sequence
        ranks = tensor.size() * sequence.size()
        held = [range(rank, len(experts), ranks) for rank in range(ranks)]
        self.places = torch.tensor([e for part in held for e in part]).argsort()
        ends = [0, *accumulate(len(part) for part in held)]
        first = tensor.rank() * sequence.size()
        spans = [slice(start, end) for start, end in pairwise(ends)]
        self.spans = spans[first : first + sequence.size()]  # of places: this tensor rank's, by sequence rank
        mine = set(held[first + sequence.rank()])
        self.own = [expert for e, expert in enumerate(experts) if e in mine]
        for e, expert in enumerate(experts):
            if e not in mine:
                _drop_weights(expert)

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Each token's weighted sum of what its experts say.

        Args:
            x: (tokens, channels), of this rank.
            experts: (tokens * k), the k routes of a token side by side.
            weights: (tokens * k, 1).
        """
        self.places = self.places.to(experts.device)
        places = self.places[experts]
        counts = places.bincount(minlength=len(self.places))
        table = all_gather(counts[None], self.sequence, dim=0).tolist()  # tokens for each place, by sequence rank
        before, here = _lengths(table[self.sequence.rank()], self.spans)
        routes = places.argsort(stable=True)[before : before + here]
        each = len(experts) // max(len(x), 1) or 1  # routes of a token
        answers = self._answers(x[routes // each], table)
        # One slot a route and a sum over slots: adding in place would add in any order on a GPU.
        slots = answers.new_zeros(len(experts), x.shape[1]).index_copy(0, routes, answers * weights[routes])
        return all_reduce(slots.view(len(x), each, x.shape[1]).sum(dim=1), self.tensor)

    def _answers(self, tokens: Tensor, table: list[list[int]]) -> Tensor:
        """What the experts at this tensor rank's places say. tokens: (routes, channels), sorted by place."""
        rank = self.sequence.rank()
        rows = [row[self.spans[rank]] for row in table]  # tokens for this rank's experts, by where they come from
        if self.sequence.size() == 1:
            return self._run([tokens], rows)[0]
        sent = torch.split(tokens, [sum(table[rank][span]) for span in self.spans])
        shapes = [torch.Size((sum(row), tokens.shape[1])) for row in rows]
        answers = self._run(all_to_all(sent, shapes, self.sequence), rows)
        return torch.cat(all_to_all(answers, [part.shape for part in sent], self.sequence))

    def _run(self, parts: Sequence[Tensor], rows: list[list[int]]) -> list[Tensor]:
        """This rank's experts on what each rank sent; each expert is called once."""
        pieces = [torch.split(part, row) for part, row in zip(parts, rows, strict=True)]
        done = [_called(expert, column) for expert, column in zip(self.own, zip(*pieces, strict=True), strict=True)]
        return [torch.cat(row) for row in zip(*done, strict=True)]


def _lengths(counts: list[int], spans: list[slice]) -> tuple[int, int]:
    """How many routes go to places before these spans, which are neighbours, and to those in them."""
    return sum(counts[: spans[0].start]), sum(counts[spans[0].start : spans[-1].stop])


def _called(expert: nn.Module, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """An expert that nobody wants is not called, as in the block's own loop."""
    joined = torch.cat(list(pieces))
    if not len(joined):
        return pieces
    count("experts")
    return torch.split(expert(joined), [len(piece) for piece in pieces])


class _Packed:
    """Stands in for the forward of a module with the weights of all experts: this rank has a range of them."""

    def __init__(self, experts: nn.Module, group: Group) -> None:
        num, ranks = _num_experts(experts), group.size()
        self.forward, self.group = experts.forward, group
        self.ranges = [slice(num * rank // ranks, num * (rank + 1) // ranks) for rank in range(ranks)]
        self.mine = self.ranges[group.rank()]
        for name, whole in list(experts.named_parameters(recurse=False)):
            setattr(experts, name, nn.Parameter(whole.detach()[self.mine].clone(), requires_grad=whole.requires_grad))
        setattr(experts, NUM_EXPERTS, self.mine.stop - self.mine.start)

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (tokens sorted by expert, and padding; channels). counts: (experts,) tokens of each."""
        numbers = counts.tolist()
        lengths = [sum(numbers[part]) for part in self.ranges]
        start = sum(lengths[: self.group.rank()])
        count("experts", self.mine.stop - self.mine.start)
        mine = self.forward(x[start : start + lengths[self.group.rank()]], counts[self.mine])
        answers = all_gather(mine, self.group, dim=0, sizes=lengths)
        return torch.cat([answers, answers.new_zeros(len(x) - len(answers), *answers.shape[1:])])


def _drop_weights(expert: nn.Module) -> None:
    """Parameters without memory, of their names and sizes: whoever counts weights finds the same on all ranks."""
    for part in expert.modules():
        for name, whole in list(part.named_parameters(recurse=False)):
            empty = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
