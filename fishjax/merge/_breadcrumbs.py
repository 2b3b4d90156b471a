"""Breadcrumbs: of each model's changes the very large and the small are dropped, leaf by leaf."""

from collections.abc import Sequence
from typing import Any

from fishjax.merge._rule import Block, Options, Rule, deltas, magnitude, numbers, only, reaches
from fishjax.merge._task import check_sum, combined, moved
from fishjax.merge._ties import check_density
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def breadcrumbs(
    models: Sequence[Params],
    *,
    base: Params,
    density: float | Sequence[float],
    gamma: float | Sequence[float] = 0.01,
    weights: Any = None,
    scale: float = 1.0,
    elect: bool = False,
    normalize: bool = False,
    keep: Keep | None = None,
) -> Params:
    """Return the base plus the changes of middling size.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all models started from.
      density: fraction of a leaf's changes kept, (0, 1], one for all or one a model.
      gamma: fraction dropped as outliers, the largest, [0, 1); where less than density + gamma would
        be left, fewer of them are dropped.
      weights: one finite number a model, 1 each by default.
      scale: what the sum is multiplied with.
      elect: take only the changes whose sign is that of the sum, as `ties` does (weights >= 0 then).
      normalize: divide by the sum of the weights; with `elect`, of those who agree.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: wrong density, gamma, weights or scale.

    >>> import numpy as np
    >>> tuned = {"w": np.float32([1, 2, 3, 9])}
    >>> breadcrumbs([tuned], base={"w": np.zeros(4, np.float32)}, density=0.5, gamma=0.25)["w"]
    array([0., 2., 3., 0.], dtype=float32)

    References: Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795, section 3.
    """
    options = {"density": density, "gamma": gamma, "weights": weights, "scale": scale}
    options |= {"elect": elect, "normalize": normalize}
    return merge_trees(BREADCRUMBS, models, base=base, keep=keep, **options)


def _check(
    n: int, *, density: Any, gamma: Any, weights: Any, scale: float, elect: bool, normalize: bool
) -> Options:
    return {
        "density": check_density(density, n),
        **check_sum(n, weights, scale, elect=elect, normalize=normalize),
        "gamma": numbers("gamma", gamma, n, 0, 1),
    }


def _magnitudes(block: Block, **_: Any) -> list[Array]:
    return [magnitude(d) for d in deltas(block)]


def _counts(n: int, *, density: Sequence[float], gamma: Sequence[float], **_: Any) -> list[list[int]]:
    counts = []
    for d, g in zip(density, gamma, strict=True):
        kept = min(n, max(1, int(d * n)))
        dropped = min(int(g * n), n - kept) if d < 1 else 0
        counts.append([dropped + 1, dropped + kept])
    return counts


def _leaf(
    block: Block, *, weights: Sequence[Any], scale: Any, elect: bool, normalize: bool, **_: Any
) -> Array:
    kept = (
        only(d, (abs(d) <= top) & reaches(d, bottom))
        for d, (top, bottom) in zip(deltas(block), block.measured, strict=True)
    )
    return moved(block, scale, combined(kept, weights, elect=elect, normalize=normalize))


BREADCRUMBS = Rule(_leaf, _check, needs_base=True, ranks=_magnitudes, counts=_counts)
