"""TIES: keep each model's largest changes, agree on a sign entry by entry, average those who agree."""

from collections.abc import Sequence
from typing import Any

from fishjax.merge._rule import (
    Block,
    Options,
    Rule,
    choice,
    deltas,
    magnitude,
    number,
    numbers,
    only,
    reaches,
)
from fishjax.merge._task import check_sum, combined, moved
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def ties(
    models: Sequence[Params],
    *,
    base: Params,
    density: float | Sequence[float],
    weights: Any = None,
    scope: str = "global",
    scale: float = 1.0,
    normalize: bool = True,
    keep: Keep | None = None,
) -> Params:
    """Return the base plus the changes on whose sign the models agree.

    Of each model the largest changes by magnitude are kept; the sign of their weighted sum is elected
    (plus, where it is zero); the weighted mean of the changes of that sign is added to the base.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all models started from.
      density: fraction kept, (0, 1], one for all or one a model; `int(density * n)` of n entries, at
        least one, and all that tie with the smallest kept.
      weights: one finite number >= 0 a model, 1 each by default; they elect and they average.
      scope: "global" ranks over the whole model, as the authors do; "tensor" leaf by leaf, as
        mergekit and peft do.
      scale: what the mean is multiplied with.
      normalize: average; False adds the changes that agree.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: wrong density, weights, scope or scale.

    >>> import numpy as np
    >>> a, b = np.float32([1, 4, -6, 0]), np.float32([3, -2, -2, 0])
    >>> ties([{"w": a}, {"w": b}], base={"w": np.zeros(4, np.float32)}, density=0.75)["w"]
    array([ 2.,  4., -4.,  0.], dtype=float32)

    References: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 4 and algorithm 1.
    """
    options = {"density": density, "weights": weights, "scope": scope, "scale": scale}
    options |= {"normalize": normalize}
    return merge_trees(TIES, models, base=base, keep=keep, **options)


def _check(n: int, *, density: Any, weights: Any, scope: str, scale: float, normalize: bool) -> Options:
    return {
        "density": check_density(density, n),
        "scope": choice("scope", scope, ("global", "tensor")),
        **check_sum(n, weights, scale, elect=True, normalize=normalize),
    }


def check_density(density: Any, n: int) -> list[float]:
    """Return n fractions in (0, 1]."""
    return [number("density", d, 1e-12, 1) for d in numbers("density", density, n, 0, 1)]


def _magnitudes(block: Block, **_: Any) -> list[Array]:
    return [magnitude(d) for d in deltas(block)]


def _counts(n: int, *, density: Sequence[float], **_: Any) -> list[list[int]]:
    return [[min(n, max(1, int(d * n)))] for d in density]


def _leaf(
    block: Block, *, weights: Sequence[Any], scale: Any, elect: bool, normalize: bool, **_: Any
) -> Array:
    # One change after the other, while it is in the cache.
    kept = (only(d, reaches(d, cut)) for d, (cut,) in zip(deltas(block), block.measured, strict=True))
    return moved(block, scale, combined(kept, weights, elect=elect, normalize=normalize))


TIES = Rule(_leaf, _check, needs_base=True, ranks=_magnitudes, counts=_counts)
