"""Choosing a merge: soups, grids, random weights and few-shot search, scored on data not reported on.

A score is a function of parameters, larger is better. `select` decides; `reports` are only looked at
for the chosen one and for each parent, side by side, so that what is reported was not chosen by.
`split` makes two parts of the examples at hand, and `few_shot` does so by itself. A merge that does
nothing, or only repeats a parent, is found by its outputs on a probe batch.
"""

from fishjax.merge.search._among import Choice, Merge, Score, Trial, among
from fishjax.merge.search._few_shot import few_shot
from fishjax.merge.search._soups import greedy, uniform
from fishjax.merge.search._split import Split, split
from fishjax.merge.search._weights import dirichlet, grid

__all__ = [
    "Choice",
    "Merge",
    "Score",
    "Split",
    "Trial",
    "among",
    "dirichlet",
    "few_shot",
    "greedy",
    "grid",
    "split",
    "uniform",
]
