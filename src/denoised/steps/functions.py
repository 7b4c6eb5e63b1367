"""What tensor methods and torch functions do, as far as a program that looks at its values later must know."""

from __future__ import annotations

# Methods that only compute: recorded. Every other attribute is looked up on the value, which forces it.
LAZY_METHODS = frozenset(
    "abs add bfloat16 chunk clamp clone contiguous cpu cuda detach div double exp expand flatten float half lerp mean "
    "movedim mul narrow neg norm permute pow repeat repeat_interleave reshape split sqrt square squeeze std sub sum "
    "tile to transpose type type_as unflatten unsqueeze var view".split()
)
# Fields of a model output that hold the prediction.
LAZY_FIELDS = frozenset({"sample"})
# What a tensor is like: told without waiting where an earlier call has shown it, and checked afterwards.
OUTLINED = ("dtype", "device")
RANDOM_FUNCTIONS = frozenset(
    "alpha_dropout bernoulli dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout "
    "gumbel_softmax multinomial normal poisson rand_like randint_like randn_like rrelu".split()
)


def changes_state(name: str) -> bool:
    """Whether a torch function writes to its input or draws random numbers: both must happen now, in program order."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    return in_place or name in RANDOM_FUNCTIONS
