"""Weights on a grid, or drawn at random."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from fishjax.errors import UsageError
from fishjax.merge.search._among import Choice, Merge, Score, among, count
from fishjax.types import Params


def grid(merge: Merge, *, parents: Sequence[Params], select: Score, points: int = 11, **more: Any) -> Choice:
    """Try evenly spaced weights that sum to one; of two models the parents are the end points.

    Args:
      merge: weights -> params, for instance `lambda w: merge.fisher(models, fishers=F, weights=w)`.
      parents: what is merged; the number of weights is theirs.
      select: the score that decides, on data held out from training and from every report.
      points: along each axis, at least 2, both ends among them.
      more: `reports` and `probe`, as in `among`.

    >>> import numpy as np
    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0)]
    >>> from fishjax.merge import average
    >>> mean = lambda w: average(models, weights=w)
    >>> found = grid(mean, parents=models, select=lambda p: -abs(float(p["w"]) - 0.3))
    >>> [round(w, 2) for w in found.weights]
    [0.7, 0.3]
    """
    if points < 2:
        raise UsageError(f"`points` must be at least 2, for both ends; got {points}")
    steps, n = points - 1, count(parents)
    candidates = [[s / steps for s in share] for share in _shares(steps, n)]
    return among(merge, candidates, parents=parents, select=select, **more)


def dirichlet(
    merge: Merge, *, parents: Sequence[Params], select: Score, trials: int = 50, seed: int = 0, **more: Any
) -> Choice:
    """Try random weights, uniform over those that sum to one, and the plain average first.

    Args:
      merge, parents, select, more: as in `grid`.
      trials: how many, at least 1.
      seed: of the draw; the same seed tries the same weights on every machine.

    References: Matena and Raffel, arXiv 2111.09832, section 4.3 (random search for more than two).

    >>> import numpy as np
    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0, 2.0)]
    >>> from fishjax.merge import average
    >>> mean = lambda w: average(models, weights=w)
    >>> found = dirichlet(mean, parents=models, select=lambda p: -float(p["w"]), trials=8)
    >>> len(found.trials)
    8
    """
    if trials < 1:
        raise UsageError(f"`trials` must be at least 1; got {trials}")
    draw, n = random.Random(seed), count(parents)
    candidates = [[1 / n] * n]
    while len(candidates) < trials:
        sizes = [draw.expovariate(1.0) for _ in range(n)]
        candidates.append([s / sum(sizes) for s in sizes])
    return among(merge, candidates, parents=parents, select=select, **more)


def _shares(total: int, parts: int) -> Iterator[list[int]]:
    """Yield all ways to share out a number among some parts, in order."""
    if parts == 1:
        yield [total]
        return
    for first in range(total + 1):
        yield from ([first, *rest] for rest in _shares(total - first, parts - 1))
