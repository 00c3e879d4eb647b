"""The catalogue: mistakes that inference backends are known to have made, each as a variant of the oracle.

A family is a module with a tuple `MISTAKES`; a new mistake is one more record in it.
"""

from assay.golden.errors import GoldenError
from assay.golden.mistakes import attention, feed_forward, masks, rope, stream, weights
from assay.golden.mistakes.mistake import Mistake

FAMILIES = {
    "positions": rope.MISTAKES,
    "attention": attention.MISTAKES,
    "window and cache": masks.MISTAKES,
    "router": feed_forward.ROUTING,
    "activation": feed_forward.ACTIVATION,
    "feed-forward biases and layout": feed_forward.BIASES,
    "weights": weights.MISTAKES,
    "norms, residual, head": stream.MISTAKES,
}
CATALOGUE: dict[str, Mistake] = {mistake.id: mistake for family in FAMILIES.values() for mistake in family}


def mistake_named(id: str) -> Mistake:
    """A mistake of the catalogue; GoldenError says which ids are near."""
    if id not in CATALOGUE:
        import difflib

        near = difflib.get_close_matches(id, CATALOGUE, 5, 0.4)
        raise GoldenError(f"unknown mistake {id!r}", expected=", ".join(near) or "an id that `assay mistakes` lists")
    return CATALOGUE[id]


__all__ = ["CATALOGUE", "FAMILIES", "Mistake", "mistake_named"]
