"""The forwards of one denoiser and of its blocks, replaced by those that ask a `Passage`.

State across steps is in the calls' own state (`rows.py`); what is here is of the forward that runs on this thread.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from denoised.features.cache.change import Group
from denoised.features.cache.course import BlockCall, main
from denoised.features.cache.lockstep import Company, Computed, Lockstep
from denoised.features.cache.passage import Passage
from denoised.features.cache.policy import Policy
from denoised.features.cache.rows import units
from denoised.features.cache.staged import StagedPassage, Stages
from denoised.features.cache.trees import leaves
from denoised.spec.blocks import Stack
from denoised.steps.forward import Part, is_company, running_rows

_APART = "cache_apart"


class _Seen(Exception):  # noqa: N818 - it ends no work in failure
    """A block has come to its attention: all that somebody wanted to know of it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__("seen")
        self.tensors = tensors


class Gathers(Protocol):
    """Who gathers the weights of blocks that are sharded."""

    def attend(self, block: nn.Module) -> Callable[[], None]:
        """Takes part in the gathers of a block that other ranks run."""
        ...

    def around(self, block: nn.Module) -> Callable[[Callable[[], Any]], Any]:
        """Runs something with the block's weights."""
        ...


class _Way(Protocol):
    """What a forward asks."""

    def block(self, call: BlockCall) -> Any:
        """What a block gives, called in the order of the program."""
        ...

    def run(self, forward: Callable[[], Any]) -> Any:
        """The forward's output, when all is remembered."""
        ...


class Wrapping:
    """Args:
    by_row: rows of a call may run apart, so that each decides for itself.
    group: ranks that share a forward and must decide alike; None: there is one.
    convoy: ranks that decide for themselves, but gather weights together; None: there are none.
    gathers: who gathers the weights of blocks; None: they are whole.
    stages: of the model; None: it is not cut.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: tuple[Stack, ...],
        policy: Policy,
        *,
        by_row: bool,
        group: Group | None,
        convoy: Group | None = None,
        gathers: Gathers | None = None,
        stages: Stages | None = None,
    ):
        self._model, self._stacks, self._policy, self._by_row, self._group = model, stacks, policy, by_row, group
        self._local, self._by = threading.local(), repr(policy)
        self._alone = (group is None or group.size() == 1) and stages is None
        self._gathers, self._stages = gathers, stages
        blocks = [block for stack in stacks for block in stack.blocks]
        self._attends = {} if gathers is None else {id(block): gathers.attend(block) for block in blocks}
        ordered = [self._attend(block) for block in blocks]
        self._lockstep = None if convoy is None else Lockstep(group=convoy, attends=ordered)

    def wrap(self) -> None:
        for stack in self._stacks:
            for block in stack.blocks:
                self._wrap_block(stack.path, block)
                for module in attention_of(block) if self._policy.look.probe == "input" else ():
                    self._wrap_attention(module)
        self._wrap_model()

    @property
    def _now(self) -> _Way | None:
        return getattr(self._local, "passage", None)

    def _attend(self, block: nn.Module) -> Callable[[], None]:
        return self._attends.get(id(block), _nothing)

    def _wrap_model(self) -> None:
        forward = self._model.forward

        @functools.wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            parts = running_rows()
            if not parts or not all(rows for _, rows in parts):
                return forward(*args, **kwargs)
            way = self._local.passage = self._way(parts)
            try:
                return way.run(functools.partial(forward, *args, **kwargs))
            finally:
                del self._local.passage

        self._model.forward = whole

    def _way(self, parts: tuple[Part, ...]) -> _Way:
        stateful = any(call.stateful for call, _ in parts)
        if self._lockstep is not None and is_company():
            return Company(self._policy, self._lockstep, runs=not stateful)
        if stateful:
            return self._computed(parts)
        chosen = units(parts, by_row=self._by_row, by=self._by, alone=self._alone)
        shared: dict[str, Any] = {"group": self._group, "look_inside": self._look_inside}
        if self._stages is not None:
            return StagedPassage(self._policy, chosen, stages=self._stages, **shared)
        return Passage(self._policy, chosen, lockstep=self._lockstep, **shared)

    def _computed(self, parts: tuple[Part, ...]) -> Computed:
        """A call that is given a store of keys and values must run: its blocks write to the store."""
        state = parts[0][0].state
        apart = bool(state.pop(_APART, False))
        if self._lockstep is not None and not apart:
            state[_APART] = True
        return Computed(self._policy, parts, self._lockstep, apart=apart)

    def _wrap_block(self, stack: str, block: nn.Module) -> None:
        forward, body, attend = block.forward, self._body(block), self._attend(block)
        named = named_by(forward)

        @functools.wraps(forward)
        def cached(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return forward(*args, **kwargs)
            call = BlockCall(
                stack=stack,
                block=block,
                run=functools.partial(forward, *args, **kwargs),
                named=named(args, kwargs),
                body=functools.partial(body, *args, **kwargs),
                attend=attend,
            )
            return now.block(call)

        block.forward = cached

    def _body(self, block: nn.Module) -> Callable[..., Any]:
        """The block's own forward, with its weights, whatever stage it is of."""
        if self._stages is None:
            forward: Callable[..., Any] = block.forward
            return forward
        own = self._stages.body(block)
        if self._gathers is None:
            return own
        around = self._gathers.around(block)
        return lambda *args, **kwargs: around(functools.partial(own, *args, **kwargs))

    def _wrap_attention(self, module: nn.Module) -> None:
        forward = module.forward
        named = named_by(forward)

        @functools.wraps(forward)
        def seen(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "looks", False):
                raise _Seen(list(main(leaves(named(args, kwargs))).values()))
            return forward(*args, **kwargs)

        module.forward = seen

    def _look_inside(self, call: BlockCall) -> list[Tensor]:
        self._local.looks = True
        try:
            call.body()
        except _Seen as seen:
            return seen.tensors
        finally:
            self._local.looks = False
        raise AssertionError("a block with attention came to none")


def _nothing() -> None:
    """Weights that are whole need no gathering."""


def named_by(forward: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Gives the arguments of a call of `forward` by parameter; what `Signature.bind` does, in a fraction of its time,
    where no parameter takes many."""
    signature = inspect.signature(forward)
    names = list(signature.parameters)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        return lambda args, kwargs: dict(signature.bind(*args, **kwargs).arguments)
    return lambda args, kwargs: dict(zip(names, args, strict=False)) | kwargs


def attention_of(block: nn.Module) -> Iterator[nn.Module]:
    """The modules in which a block looks at other tokens: those with a projection to queries."""
    for part in block.modules():
        if any(name.startswith(("to_q", "q_proj")) for name, _ in part.named_children()):
            yield part
