"""Which degrees divide a plan, and the sentence for one that does not."""

from __future__ import annotations

from denoised.spec.tensor import Attention, Plan


def allowed(plan: Plan) -> tuple[int, ...]:
    """All degrees that divide every attention and every layer of a plan, in ascending order."""
    most = min((attention.heads for attention in plan.attentions), default=1)
    return tuple(degree for degree in range(1, most + 1) if obstacle(plan, degree) is None)


def obstacle(plan: Plan, degree: int) -> str | None:
    """What the degree does not divide, as "4 heads"; None if it divides everything."""
    for attention in plan.attentions:
        if attention.heads % degree:
            return f"{attention.heads} heads"
        if not _divides_keys(attention, degree):
            return f"{attention.key_heads} key heads"
    for layer in plan.layers:
        for size in layer.sizes:
            if size % degree and not layer.copied:
                return f"{size} {layer.part}"
    return None


def _divides_keys(attention: Attention, degree: int) -> bool:
    """Fewer key heads than ranks: each is held by several, of which each needs one alone."""
    return attention.key_heads % degree == 0 or degree % attention.key_heads == 0


def listed(degrees: tuple[int, ...]) -> str:
    """As in: 1, 2 or 4."""
    texts = [str(degree) for degree in degrees]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
