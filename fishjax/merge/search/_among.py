"""What every search shares: weights that were tried, the choice among them, and what is reported of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fishjax.errors import UsageError
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
        trials.append(Trial(tuple(weights), checked_score(select, params)))
        if best is None or trials[-1].score > best[0]:
            best = trials[-1].score, trials[-1].weights, params
    assert best is not None
    for name, report in (reports or {}).items():
        if report is select:
            raise UsageError(
                f"report `{name}` is the score that selects; report on data that was not chosen by"
            )
    choice = chosen(best[1], best[2], trials, parents, reports=reports, probe=probe)
    return choice._replace(warnings=[*warnings, *choice.warnings])


def chosen(
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


def count(parents: Sequence[Params], name: str = "parents") -> int:
    """Return how many models there are to choose among, at least one."""
    if not parents:
        raise UsageError(f"`{name}` must hold at least one model; got none")
    return len(parents)


def checked_score(select: Score, params: Params) -> float:
    score = float(select(params))
    if score != score:
        raise UsageError("`select` gave NaN; a score must be a number")
    return score


def one_hot(i: int, n: int) -> tuple[float, ...]:
    return tuple(float(j == i) for j in range(n))
