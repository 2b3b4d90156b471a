"""Weights by a few labelled examples."""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

from fishjax.errors import UsageError
from fishjax.merge.search._among import Choice, Merge, Score, Trial, checked_score, chosen, count, one_hot
from fishjax.merge.search._split import split
from fishjax.types import Array, Batch, Params

SMALLEST = 1 / 64  # the least weight that is moved: few examples tell no finer


def few_shot(
    merge: Merge,
    *,
    parents: Sequence[Params],
    score: Callable[[Params, Batch], float],
    examples: Batch,
    held_out: float = 0.5,
    seed: int = 0,
    trials: int = 100,
    reports: Mapping[str, Score] | None = None,
    probe: Callable[[Params], Array] | None = None,
) -> Choice:
    """Search for weights by a few labelled examples, of which a part is held out for the report.

    From the best of the plain average and the parents on, weight is moved from one model to
    another as long as that helps, then half as much at a time. Weights are >= 0 and sum to one. No
    gradient is taken, so any merge and any score will do; one that is smooth (a mean log-likelihood)
    tells more of few examples than an accuracy does.

    Args:
      merge, parents, reports, probe: as in `among`.
      score: of parameters on a batch, larger is better.
      examples: a pytree of arrays with one leading axis, [B, ...].
      held_out, seed: how they are split; see `split`.
      trials: merges that are scored at most; at least one more than there are parents.

    Returns:
      The choice, with the reports "held in" (chosen by) and "held out" (not chosen by) of the merge
      and of each parent; a warning where a parent does better on what was held out.

    Raises:
      UsageError: too few trials or examples; a score that is NaN.

    References: Huang et al., "LoraHub", arXiv 2307.13269 (weights by few examples and no gradient);
    Kolda, Lewis and Torczon, "Optimization by direct search", SIAM Review 45 (2003).

    >>> import numpy as np
    >>> from fishjax.merge import average
    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0)]
    >>> near = lambda params, batch: -float(abs(batch["x"] - params["w"]).mean())
    >>> rows = {"x": np.array([0.74, 0.75, 0.76, 0.77])}
    >>> found = few_shot(lambda w: average(models, weights=w), parents=models, score=near, examples=rows)
    >>> [round(w, 1) for w in found.weights]
    [0.2, 0.8]
    """
    n = count(parents)
    if trials <= n:
        raise UsageError(
            f"`trials` must be at least {n + 1}, to try the average and each parent; got {trials}"
        )
    parts = split(examples, held_out=held_out, seed=seed)
    tried: dict[tuple[float, ...], Trial] = {}
    best: tuple[Trial, Params] | None = None

    def better(weights: Sequence[float]) -> bool:
        """Score weights that are new; say whether they are the best so far."""
        nonlocal best
        key = tuple(weights)
        if key in tried or len(tried) == trials:
            return False
        params = merge(key)
        tried[key] = Trial(key, checked_score(lambda p: score(p, parts.held_in), params))
        found = best is None or tried[key].score > best[0].score
        best = (tried[key], params) if found else best
        return found

    for start in [(1 / n,) * n, *(one_hot(i, n) for i in range(n))]:
        better(start)
    assert best is not None
    step = 0.25
    while step >= SMALLEST and len(tried) < trials:
        moves = [_moved(best[0].weights, step, i, j) for i, j in permutations(range(n), 2)]
        if not any(better(weights) for weights in moves):
            step /= 2
    both: dict[str, Score] = {
        "held in": lambda p: score(p, parts.held_in),
        "held out": lambda p: score(p, parts.held_out),
    }
    choice = chosen(
        best[0].weights,
        best[1],
        list(tried.values()),
        parents,
        reports={**both, **(reports or {})},
        probe=probe,
    )
    scores = choice.reports["held out"]
    first = max(scores, key=scores.__getitem__)
    if scores[first] > scores["merged"]:
        choice.warnings.append(
            f"held out, {first} scores {scores[first]:g} and the merge {scores['merged']:g}: the weights may "
            "fit the examples they were chosen by, and no others"
        )
    return choice


def _moved(weights: Sequence[float], step: float, giver: int, taker: int) -> tuple[float, ...]:
    moved = list(weights)
    amount = min(step, moved[giver])
    moved[giver] -= amount
    moved[taker] += amount
    return tuple(moved)
