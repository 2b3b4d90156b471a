"""Choosing a merge: soups, grids and random weights, scored on data that is not reported on.

A score is a function of parameters, larger is better. `select` decides; `reports` are only looked at
for the chosen one and for each parent, side by side, so that what is reported was not chosen by. A
merge that does nothing, or only repeats a parent, is found by its outputs on a probe batch.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax.errors import UsageError
from fishjax.merge._average import average
from fishjax.types import Array, Params

Score = Callable[[Params], float]
Merge = Callable[[Sequence[float]], Params]


class Trial(NamedTuple):
    """Weights that were tried, and their score on the selection data."""

    weights: tuple[float, ...]
    score: float


class Choice(NamedTuple):
    """What was chosen, why, and how it fares elsewhere."""

    weights: tuple[float, ...]
    params: Params
    trials: list[Trial]  # in the order in which they were tried; the end points first, where there are any
    reports: dict[str, dict[str, float]]  # {report: {"merged": score, "parent 0": score, ...}}
    warnings: list[str]


def uniform(models: Sequence[Params], *, select: Score, **more: Any) -> Choice:
    """Return the plain average of models, scored; see `among` for the other arguments.

    >>> uniform([{"w": np.ones(2)}, {"w": np.zeros(2)}], select=lambda p: -abs(p["w"] - 0.5).sum()).weights
    (0.5, 0.5)
    """
    n = len(models)
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

    >>> models = [{"w": np.array(x)} for x in (0.0, 10.0, 1.0)]
    >>> greedy(models, select=lambda p: -abs(float(p["w"]) - 0.6)).weights
    (0.5, 0.0, 0.5)
    """
    n = len(models)
    if not n:
        raise UsageError("`models` must hold at least one model; got none")
    ends = [Trial(_one_hot(i, n), _score(select, m)) for i, m in enumerate(models)]
    order = sorted(range(n), key=lambda i: -ends[i].score)
    kept, best, trials = [order[0]], ends[order[0]].score, list(ends)
    for i in order[1:]:
        weights = _mean_of([*kept, i], n)
        trials.append(Trial(weights, _score(select, average([models[j] for j in [*kept, i]]))))
        if trials[-1].score >= best:
            kept, best = [*kept, i], trials[-1].score
    params = average([models[j] for j in kept])
    return _chosen(_mean_of(kept, n), params, trials, models, **more)


def grid(merge: Merge, *, parents: Sequence[Params], select: Score, points: int = 11, **more: Any) -> Choice:
    """Try evenly spaced weights that sum to one; of two models the parents are the end points.

    Args:
      merge: weights -> params, for instance `lambda w: merge.fisher(models, fishers=F, weights=w)`.
      parents: what is merged; the number of weights is theirs.
      select: the score that decides, on data held out from training and from every report.
      points: along each axis, at least 2, both ends among them.
      more: `reports` and `probe`, as in `among`.

    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0)]
    >>> mean = lambda w: average(models, weights=w)
    >>> found = grid(mean, parents=models, select=lambda p: -abs(float(p["w"]) - 0.3))
    >>> [round(w, 2) for w in found.weights]
    [0.7, 0.3]
    """
    if points < 2:
        raise UsageError(f"`points` must be at least 2, for both ends; got {points}")
    steps, n = points - 1, len(parents)
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

    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0, 2.0)]
    >>> mean = lambda w: average(models, weights=w)
    >>> found = dirichlet(mean, parents=models, select=lambda p: -float(p["w"]), trials=8)
    >>> len(found.trials)
    8
    """
    if trials < 1:
        raise UsageError(f"`trials` must be at least 1; got {trials}")
    draw, n = random.Random(seed), len(parents)
    candidates = [[1 / n] * n]
    while len(candidates) < trials:
        sizes = [draw.expovariate(1.0) for _ in range(n)]
        candidates.append([s / sum(sizes) for s in sizes])
    return among(merge, candidates, parents=parents, select=select, **more)


def among(
    merge: Merge,
    candidates: Sequence[Sequence[float]],
    *,
    parents: Sequence[Params],
    select: Score,
    reports: Mapping[str, Score] | None = None,
    probe: Callable[[Params], Array] | None = None,
) -> Choice:
    """Merge with each of several weights and choose the best score; the first of equals.

    Args:
      merge: weights -> params.
      candidates: the weights to try.
      parents: what is merged, for the reports.
      select: the score that decides: on data held out from training and from every report.
      reports: further scores by name (the tasks that were merged, and others that were not), taken of
        the chosen merge and of each parent only.
      probe: params -> outputs on a fixed batch; with it a merge that equals a parent is warned about,
        and so is one that was asked for a parent alone (weight 1, all others 0) and is something else.

    Raises:
      UsageError: no candidates, or weights of another number than there are parents; `select` is one of
        the reports, or does not give a number.

    >>> models = [{"w": np.array(x)} for x in (0.0, 1.0)]
    >>> same = lambda w: models[0]
    >>> found = among(same, [[0.5, 0.5]], parents=models, select=lambda p: 0.0, probe=lambda p: p["w"])
    >>> found.warnings
    ['the merge with weights (0.5, 0.5) gives the outputs of parent 0']
    """
    if not candidates:
        raise UsageError("`candidates` must hold at least one set of weights; got none")
    for weights in candidates:
        if len(weights) != len(parents):
            raise UsageError(
                f"weights must be one for each of the {len(parents)} parents; got {len(weights)}"
            )
    best: tuple[float, tuple[float, ...], Params] | None = None
    trials, warnings = [], []
    for weights in candidates:
        params = merge(weights)
        if probe is not None and sorted(weights) == [0.0] * (len(parents) - 1) + [1.0]:
            i = list(weights).index(1)
            if not np.allclose(probe(params), probe(parents[i]), rtol=1e-4, atol=1e-5):
                warnings.append(
                    f"the merge with weights {tuple(weights)} does not give the outputs of parent {i}"
                )
        trials.append(Trial(tuple(weights), _score(select, params)))
        if best is None or trials[-1].score > best[0]:
            best = trials[-1].score, trials[-1].weights, params
    assert best is not None
    for name, report in (reports or {}).items():
        if report is select:
            raise UsageError(
                f"report `{name}` is the score that selects; report on data that was not chosen by"
            )
    choice = _chosen(best[1], best[2], trials, parents, reports=reports, probe=probe)
    return choice._replace(warnings=[*warnings, *choice.warnings])


def _chosen(
    weights: tuple[float, ...],
    params: Params,
    trials: list[Trial],
    parents: Sequence[Params],
    *,
    reports: Mapping[str, Score] | None = None,
    probe: Callable[[Params], Array] | None = None,
) -> Choice:
    named = {"merged": params, **{f"parent {i}": p for i, p in enumerate(parents)}}
    table = {r: {n: float(score(p)) for n, p in named.items()} for r, score in (reports or {}).items()}
    warnings = []
    if probe is not None and sum(w != 0 for w in weights) > 1:
        outputs = np.asarray(probe(params))
        shown = tuple(round(w, 4) for w in weights)
        for i, parent in enumerate(parents):
            if np.array_equal(outputs, np.asarray(probe(parent))):
                warnings.append(f"the merge with weights {shown} gives the outputs of parent {i}")
    if len({t.score for t in trials}) == 1 and len(trials) > 1:
        warnings.append(f"all {len(trials)} trials score {trials[0].score:g}; the choice means nothing")
    return Choice(weights, params, trials, table, warnings)


def _shares(total: int, parts: int) -> Iterator[list[int]]:
    """Yield all ways to share out a number among some parts, in order."""
    if parts == 1:
        yield [total]
        return
    for first in range(total + 1):
        yield from ([first, *rest] for rest in _shares(total - first, parts - 1))


def _score(select: Score, params: Params) -> float:
    score = float(select(params))
    if score != score:
        raise UsageError("`select` gave NaN; a score must be a number")
    return score


def _one_hot(i: int, n: int) -> tuple[float, ...]:
    return tuple(float(j == i) for j in range(n))


def _mean_of(kept: Sequence[int], n: int) -> tuple[float, ...]:
    return tuple(1 / len(kept) if j in kept else 0.0 for j in range(n))
