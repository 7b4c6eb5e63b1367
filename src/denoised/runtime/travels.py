"""Which encoder and VAE calls one rank may run for all ranks of the cfg axis: those whose results can travel.

That is learned: a call of a new form runs on every rank, and what it gave tells whether the next of its form need not.
Encoders may give the hidden states of all their layers, which take longer to send than to compute.
"""

from __future__ import annotations

from typing import Any

from denoised.steps.forward import Call, Stage
from denoised.steps.wire import Wire

# Bytes of an encoder's result that are sent at most. What a VAE decodes is worth sending at any size.
MAX_BYTES = 32 * 2**20
_PLAIN = (str, int, float, bool, type(None))


class Travels:
    """Equal on every rank. `wire`: None where every rank has to run all of them: there is one, or they hold
    collectives of ranks at several places of the cfg axis."""

    def __init__(self, wire: Wire | None) -> None:
        self._wire = wire
        self._forms: dict[Any, bool] = {}

    def knows(self, call: Call) -> bool:
        """Whether results of such calls can travel."""
        return self._forms.get(_form(call), False)

    def learn(self, call: Call, value: Any) -> None:
        """A call was run here, as on every other rank."""
        if self._wire is not None and self._forms.get(_form(call), True):
            limit = None if call.target.stage is Stage.DECODE else MAX_BYTES
            self._forms[_form(call)] = self._wire.carries(value, max_bytes=limit)


def _form(call: Call) -> Any:
    """What the structure of a result depends on: the method and its switches."""
    plain = tuple((name, value) for name, value in sorted(call.named_arguments().items()) if isinstance(value, _PLAIN))
    return call.target.name, call.target.method, call.ambient.inference, plain
