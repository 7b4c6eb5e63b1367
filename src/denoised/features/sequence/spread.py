"""What the wrapped forwards of one denoiser share: what is cut now, who attends to whom, and whether all went well."""

from __future__ import annotations

import functools
import inspect
import threading
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from denoised.attention.intercept import Attention
from denoised.attention.layout import Layout
from denoised.attention.sharded import Axes, sequence_attention
from denoised.errors import EngineError, InvalidConfigError, InvalidRequestError
from denoised.features.sequence.modules import argument, attention_modules, find, replaced
from denoised.features.sequence.state import Forward, Inside
from denoised.spec.sequence import Cut, Gather, SequencePlan
from denoised.steps import collectives

STRICT, UNEVEN = "strict", "advanced_uaa"
WAY_OUT = "use ulysses_degree=1 and ring_degree=1"


class Spread:
    """What the wrapped forwards of one model share."""

    def __init__(self, model: nn.Module, plan: SequencePlan, axes: Axes, mode: str) -> None:
        self._model, self._plan, self._axes, self._mode = model, plan, axes, mode
        self._name = type(model).__name__
        self._order = list(dict.fromkeys(cut.stream for cut in plan.cuts if cut.stream))
        self._proved = False  # some forward has exchanged, so one without any attention skipped its blocks
        self._running = threading.local()

    @property
    def _now(self) -> Forward | None:
        return getattr(self._running, "forward", None)

    # ------------------------------------------------------------------ wrapping

    def check(self) -> None:
        """Whether the model has what the plan names. Raises InvalidConfigError."""
        for module, (cuts, _) in self._edits().items():
            self._check_names(cuts, list(inspect.signature(module.forward).parameters))

    def wrap(self) -> None:
        for name, module in attention_modules(self._model):
            self._wrap_attention(name, module)
        for module, (cuts, gathers) in self._edits().items():
            self._wrap_edits(module, cuts, gathers)
        self._wrap_model()

    def _edits(self) -> dict[nn.Module, tuple[list[Cut], list[Gather]]]:
        """What the plan does at each module."""
        edits: dict[nn.Module, tuple[list[Cut], list[Gather]]] = {}
        for cut in self._plan.cuts:
            for module in self._modules(cut.module):
                edits.setdefault(module, ([], []))[0].append(cut)
        for gather in self._plan.gathers:
            for module in self._modules(gather.module):
                edits.setdefault(module, ([], []))[1].append(gather)
        return edits

    def _modules(self, path: str) -> list[nn.Module]:
        found = find(self._model, path.split(".") if path else [])
        if not found:
            raise InvalidConfigError(
                f"the sequence plan of {self._name} names {path!r}, which this model does not have; {WAY_OUT}."
            )
        return found

    def _check_names(self, cuts: list[Cut], names: list[str]) -> None:
        for cut in cuts:
            if isinstance(cut.item, str) and cut.item not in names:
                raise InvalidConfigError(
                    f"the sequence plan of {self._name} names input {cut.item!r} of {cut.module!r}, which takes only "
                    f"{', '.join(names)}; {WAY_OUT}."
                )

    def _wrap_attention(self, name: str, module: nn.Module) -> None:
        forward = module.forward
        rules = [rule for rule in self._plan.attends if fnmatchcase(name, rule.modules)]
        names = list(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def attention(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return forward(*args, **kwargs)
            given = argument(names, "encoder_hidden_states", args, kwargs) is not None
            now.inside.append(Inside(name=name, rules=rules, given=given))
            try:
                return forward(*args, **kwargs)
            finally:
                now.inside.pop()

        module.forward = attention

    def _wrap_edits(self, module: nn.Module, cuts: list[Cut], gathers: list[Gather]) -> None:
        forward = module.forward
        names = list(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def edited(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return forward(*args, **kwargs)
            args, kwargs = self._cut_inputs(now, cuts, names, args, kwargs)
            output = self._cut_outputs(now, cuts, forward(*args, **kwargs))
            for gather in gathers:
                output = replaced(output, gather.item, functools.partial(self._gathered, now, gather))
            return output

        module.forward = edited

    def _wrap_model(self) -> None:
        forward = self._model.forward

        @functools.wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            now = self._running.forward = Forward()
            try:
                with Attention(self._answer):
                    output = forward(*args, **kwargs)
            finally:
                del self._running.forward
            self._check(now)
            return output

        self._model.forward = whole

    # ------------------------------------------------------------------ cutting and gathering

    def _cut_inputs(
        self, now: Forward, cuts: list[Cut], names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, named = list(args), dict(kwargs)
        for cut in cuts:
            if cut.item in named:
                named[str(cut.item)] = self._cut(now, cut, named[str(cut.item)])
            elif cut.item in names and names.index(str(cut.item)) < len(positional):
                index = names.index(str(cut.item))
                positional[index] = self._cut(now, cut, positional[index])
        return tuple(positional), named

    def _cut_outputs(self, now: Forward, cuts: list[Cut], output: Any) -> Any:
        for cut in cuts:
            if isinstance(cut.item, int):
                output = replaced(output, cut.item, functools.partial(self._cut, now, cut))
        return output

    def _cut(self, now: Forward, cut: Cut, value: Any) -> Any:
        """This rank's piece of a tensor or of each tensor of a tuple."""
        if isinstance(value, list | tuple):
            return type(value)(self._cut(now, cut, part) for part in value)
        if cut.trailing and isinstance(value, int):
            return self._cut_trailing(now.streams[cut.trailing], value)
        if not isinstance(value, Tensor) or (cut.num_dims not in (None, value.dim()) and not cut.stream):
            return value
        num = value.shape[cut.dim]
        if cut.leading:
            return self._cut_leading(now.streams[cut.leading], cut.dim, value)
        if not cut.stream and num == 1:  # one entry for all tokens
            return value
        if cut.stream:
            self._check_length(cut.stream, num)
            now.streams[cut.stream], now.was_cut = num, True
        return self._piece(value, cut.dim)

    def _cut_leading(self, num: int, dim: int, value: Tensor) -> Tensor:
        """The first `num` entries are cut, the rest is this rank's own."""
        rest = value.narrow(dim, num, value.shape[dim] - num)
        return torch.cat([self._piece(value.narrow(dim, 0, num), dim), rest], dim=dim)

    def _cut_trailing(self, num: int, last: int) -> int:
        """Of the `last` tokens of a stream of `num`, how many are this rank's."""
        layout, rank = self._axes.layout(num), self._axes.rank
        end = sum(layout.lengths[: rank + 1])
        return min(max(end - (num - last), 0), layout.lengths[rank])

    def _piece(self, whole: Tensor, dim: int) -> Tensor:
        layout, rank = self._axes.layout(whole.shape[dim]), self._axes.rank
        return whole.narrow(dim, sum(layout.lengths[:rank]), layout.lengths[rank])

    def _check_length(self, stream: str, num: int) -> None:
        size = self._axes.size
        if self._mode == STRICT and num % size:
            raise InvalidRequestError(
                f"{num} tokens of {stream} cannot be dealt evenly to ring_degree x ulysses_degree = {size} ranks; "
                f"start with ulysses_mode={UNEVEN}, or ask for another size."
            )
        if num < size and stream == self._plan.gathers[0].stream:
            raise InvalidRequestError(
                f"{num} tokens of {stream} are fewer than ring_degree x ulysses_degree = {size} ranks; "
                "ask for a larger size."
            )

    def _gathered(self, now: Forward, gather: Gather, x: Tensor) -> Tensor:
        """The whole stream, on all ranks; with the last of its kind, all streams end."""
        if gather.stream not in now.streams:  # never cut, which the end of the forward tells
            return x
        ring, layout = self._axes.ring, self._axes.layout(now.streams.pop(gather.stream))
        row = collectives.all_gather(x, self._axes.ulysses, dim=gather.dim, sizes=layout.row(ring.rank()))
        if not any(other.stream in now.streams for other in self._plan.gathers):
            now.streams.clear()
        return collectives.all_gather(row, ring, dim=gather.dim, sizes=layout.rows)

    # ------------------------------------------------------------------ attention

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Attention over the spread sequence; None where every rank has all keys."""
        now = self._now
        assert now is not None
        if not now.streams:
            return None
        now.attended += 1
        layouts = self._layouts(now, query, key)
        if layouts is None:  # every rank has all keys; torch divides by a number of queries that may be none
            return None if query.numel() else value.new_zeros((*query.shape[:-1], value.shape[-1]))
        now.exchanged += 1
        if self._plan.outer_masks and attn_mask is not None:
            attn_mask = attn_mask.any(dim=-2, keepdim=True)
        return sequence_attention(
            query,
            key,
            value,
            axes=self._axes,
            queries=layouts[0],
            keys=layouts[1],
            mask=attn_mask,
            causal=is_causal,
            scale=scale,
        )

    def _layouts(self, now: Forward, query: Tensor, key: Tensor) -> tuple[Layout, Layout] | None:
        """Where the queries and the keys are, by the plan; None if the keys are not spread."""
        names = self._streams_of(now, key.shape[-2])
        if names is None:
            return None
        queries, keys = (self._axes.layout(*(now.streams[name] for name in side)) for side in names)
        rank = self._axes.rank
        if self._plan.cached_keys and key.shape[-2] != keys.lengths[rank]:
            keys = self._axes.asked(key.shape[-2], key.device)
        for tensor, layout in ((query, queries), (key, keys)):
            if tensor.shape[-2] != layout.lengths[rank]:
                raise EngineError(self._wrong_length(now, tensor.shape[-2], layout.lengths[rank]))
        return queries, keys

    def _streams_of(self, now: Forward, num_keys: int) -> tuple[list[str], list[str]] | None:
        """Which streams ask and which answer; None if the keys are not spread."""
        inside = now.inside[-1] if now.inside else None
        cut = [name for name in self._order if name in now.streams]
        rule = inside.next_rule() if inside is not None else None
        if rule is not None:
            return None if rule.keys is None else (list(rule.queries), list(rule.keys))
        if inside is not None and inside.given and len(cut) == 1:
            return None
        if inside is None and num_keys != self._axes.layout(*now.streams.values()).lengths[self._axes.rank]:
            return None
        return cut, cut

    def _wrong_length(self, now: Forward, got: int, expected: int) -> str:
        where = now.inside[-1].name if now.inside else "a function"
        return (
            f"{self._name}: attention in {where} sees {got} tokens where its sequence plan gives this rank "
            f"{expected}; {WAY_OUT}."
        )

    def _check(self, now: Forward) -> None:
        """A forward that was not spread, or not put together again, is an error and not a picture."""
        skipped = self._proved and not now.attended
        if not now.was_cut or now.streams or not (now.exchanged or skipped):
            what = (
                "its sequence was not cut" if not now.was_cut else "no attention exchanged the pieces of its sequence"
            )
            what = "its sequence was not put together again" if now.streams else what
            raise EngineError(f"{self._name} on {self._axes.size} ranks: {what}, so the result is wrong; {WAY_OUT}.")
        self._proved = self._proved or now.exchanged > 0
