"""One row: a checkpoint that can be built in code, and the requests that tests send to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline

Request = dict[str, Any]

# Different lengths on purpose: rows of different requests then differ in their number of text tokens.
PROMPTS = ("a cat sits on the table", "two red birds over a quiet lake", "an old robot paints")
NEGATIVE = "blurry, low quality"


@dataclass(frozen=True, kw_only=True)
class Row:
    """`request(i)` and `unguided(i)` give the keywords of the pipeline's call, without generator and output type.

    Requests 0, 1 and 2 differ in prompt and number of steps; 0 and 1 are of one size where the model permits,
    so that their denoiser calls may be joined, and 2 is of another.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    request: Callable[[int], Request]
    unguided: Callable[[int], Request] | None = None  # None: the model has no guidance, or cannot leave it out
    branches: int  # guidance branches of request(0), at the step that has most of them
    batched: bool = False  # True: one denoiser call has the branches in its batch; False: one call a branch
    joins: bool = True  # False: a denoiser call is one packed sample, which nothing can be added to
    kind: Literal["image", "video", "audio"] = "image"
    folder: str | None = None  # the row whose checkpoint this one uses, if not its own
    output_type: str = "latent"  # what a comparison should ask for: "latent", unless the pipeline cannot give it


def varied(i: int, *, steps: tuple[int, int, int] = (3, 2, 4), **sizes: tuple[Any, Any, Any]) -> Request:
    """The part that every request has: its prompt, its number of steps, and the i-th of each given size."""
    return {"prompt": PROMPTS[i], "num_inference_steps": steps[i]} | {key: value[i] for key, value in sizes.items()}
