"""Soups: averages of all models, or of those that do not hurt."""

from collections.abc import Sequence
from typing import Any

from fishjax.merge._average import average
from fishjax.merge.search._among import Choice, Score, Trial, among, checked_score, chosen, count, one_hot
from fishjax.types import Params


def uniform(models: Sequence[Params], *, select: Score, **more: Any) -> Choice:
    """Return the plain average of models, scored; see `among` for the other arguments.

    >>> import numpy as np
    >>> uniform([{"w": np.ones(2)}, {"w": np.zeros(2)}], select=lambda p: -abs(p["w"] - 0.5).sum()).weights
    (0.5, 0.5)
    """
    n = count(models, "models")
    mean = lambda weights: average(models, weights=weights)
    return among(mean, [[1 / n] * n], parents=models, select=select, **more)


def greedy(models: Sequence[Params], *, select: Score, **more: Any) -> Choice:
    """Return the greedy soup: models by falling score, each kept in the average if that does not hurt.

    A model may come in only once. Weights are 1/k for the k that are kept, else 0.

    Args:
      models: trees with the same structure.
      select: the score that decides, on data held out from training and from every report.
      more: `reports` and `probe`, as in `among`.

    References: Wortsman et al., "Model soups", arXiv 2203.05482, algorithm 1.

    >>> import numpy as np
    >>> models = [{"w": np.array(x)} for x in (0.0, 10.0, 1.0)]
    >>> greedy(models, select=lambda p: -abs(float(p["w"]) - 0.6)).weights
    (0.5, 0.0, 0.5)
    """
    n = count(models, "models")
    ends = [Trial(one_hot(i, n), checked_score(select, m)) for i, m in enumerate(models)]
    order = sorted(range(n), key=lambda i: -ends[i].score)
    kept, best, trials = [order[0]], ends[order[0]].score, list(ends)
    for i in order[1:]:
        weights = _mean_of([*kept, i], n)
        trials.append(Trial(weights, checked_score(select, average([models[j] for j in [*kept, i]]))))
        if trials[-1].score >= best:
            kept, best = [*kept, i], trials[-1].score
    params = average([models[j] for j in kept])
    return chosen(_mean_of(kept, n), params, trials, models, **more)


def _mean_of(kept: Sequence[int], n: int) -> tuple[float, ...]:
    return tuple(1 / len(kept) if j in kept else 0.0 for j in range(n))
