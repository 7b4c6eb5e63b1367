"""The forwards of one denoiser and of its blocks, replaced by those that ask a `Passage`.

State across steps is in the calls' own state (`rows.py`); what is here is of the forward that runs on this thread.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from denoised.features.cache.change import Group
from denoised.features.cache.course import BlockCall
from denoised.features.cache.passage import Passage
from denoised.features.cache.policy import Policy
from denoised.features.cache.rows import units
from denoised.spec.blocks import Stack
from denoised.steps.forward import Decision, Part, running_rows


class _Seen(Exception):  # noqa: N818 - it ends no work in failure
    """A block has come to its attention: all that somebody wanted to know of it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__("seen")
        self.tensors = tensors


class Wrapping:
    """Args:
    by_row: rows of a call may run apart, so that each decides for itself.
    group: ranks that share a forward and must decide alike; None: there is one.
    """

    def __init__(
        self, model: nn.Module, stacks: tuple[Stack, ...], policy: Policy, *, by_row: bool, group: Group | None
    ):
        self._model, self._stacks, self._policy, self._by_row, self._group = model, stacks, policy, by_row, group
        self._local, self._by = threading.local(), repr(policy)
        self._alone = group is None or group.size() == 1

    def wrap(self) -> None:
        for stack in self._stacks:
            for block in stack.blocks:
                self._wrap_block(stack.path, block)
                for module in attention_of(block) if self._policy.look.probe == "input" else ():
                    self._wrap_attention(module)
        self._wrap_model()

    @property
    def _now(self) -> Passage | None:
        return getattr(self._local, "passage", None)

    def _wrap_model(self) -> None:
        forward = self._model.forward

        @functools.wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            parts = running_rows()
            if not parts or not all(rows for _, rows in parts):
                return forward(*args, **kwargs)
            if any(call.stateful for call, _ in parts):
                return self._computed(parts, functools.partial(forward, *args, **kwargs))
            chosen = units(parts, by_row=self._by_row, by=self._by, alone=self._alone)
            passage = Passage(self._policy, chosen, group=self._group, look_inside=self._look_inside)
            self._local.passage = passage
            try:
                output = forward(*args, **kwargs)
            finally:
                del self._local.passage
            passage.commit()
            return output

        self._model.forward = whole

    def _computed(self, parts: tuple[Part, ...], run: Callable[[], Any]) -> Any:
        """A call that is given a store of keys and values must run: its blocks write to the store."""
        output = run()
        for call, rows in parts:
            call.decisions += [Decision(by=self._policy.name, row=row, computed=True) for row in rows]
        return output

    def _wrap_block(self, stack: str, block: nn.Module) -> None:
        forward = block.forward
        named = named_by(forward)

        @functools.wraps(forward)
        def cached(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return forward(*args, **kwargs)
            run = functools.partial(forward, *args, **kwargs)
            return now.block(BlockCall(stack=stack, run=run, named=named(args, kwargs)))

        block.forward = cached

    def _wrap_attention(self, module: nn.Module) -> None:
        forward = module.forward
        named = named_by(forward)

        @functools.wraps(forward)
        def seen(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "looks", False):
                raise _Seen(list(BlockCall(stack="", run=lambda: None, named=named(args, kwargs)).main().values()))
            return forward(*args, **kwargs)

        module.forward = seen

    def _look_inside(self, call: BlockCall) -> list[Tensor]:
        self._local.looks = True
        try:
            call.run()
        except _Seen as seen:
            return seen.tensors
        finally:
            self._local.looks = False
        raise AssertionError("a block with attention came to none")


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
