"""One pipeline class of the sweep: how to build it tiny, and what to ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

from tests.tiny.row import NEGATIVE, PROMPTS, Request, Row

Kind = str  # "image", "video", "audio"
_STEPS = (4, 2)  # far enough apart that what the shorter leaves behind at its end meets the longer


@dataclass(frozen=True, kw_only=True)
class Case:
    """`call`: keywords of the pipeline's call beside prompt and number of steps. `first` and `second` differ.

    branches: guidance branches of a step, all requests alike; 1: the class, or the class as we build it, has none.
    steps: the name of the keyword for the number of steps, "" where there is none.
    forms: prompts that must look otherwise than a sentence.
    whole: why a denoiser call with several branches cannot be divided; "" if it can.
    double: guidance is compared in float64, because what comes after it (a code book, a threshold, a norm over few
        values) makes more of a rounding error than the bound.
    """

    pipeline: str
    build: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any] = field(default_factory=dict)
    branches: int = 2
    kind: Kind = "image"
    output_type: str = "np"
    negative: bool = True
    steps: str = "num_inference_steps"
    forms: tuple[str, ...] = PROMPTS
    whole: str = ""
    double: bool = False
    row: Row | None = None

    def request(self, index: int) -> Request:
        """The index-th request, 0 or 1: another prompt, another number of steps."""
        if self.row is not None:
            return self.row.request(index)
        request: Request = {"prompt": self.forms[index], **self.call}
        if self.negative and self.branches > 1:
            request.setdefault("negative_prompt", NEGATIVE)
        return request | ({self.steps: _STEPS[index]} if self.steps else {})

    def endless(self) -> Request:
        """Request 0 with so many steps that it can be stopped long before its end; lists of steps stay."""
        request, name = self.request(0), self.steps or "decoder_num_inference_steps"
        return request | {name: 40} if name in request else request


def of_row(row: Row, pipeline: str) -> Case:
    """A class of which `tests.tiny` has a checkpoint already."""
    return Case(pipeline=pipeline, build=row.build, branches=row.branches, kind=row.kind, row=row, output_type="pt")
