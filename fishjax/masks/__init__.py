"""Masks: which entries of the parameters are kept, as a bool for each.

`topk` of a Fisher is the FISH mask (Sung et al. 2021, arXiv 2111.09839); `random`, `magnitude`,
`saliency`, `movement`, `bitfit` and `by_name` are its baselines, and `gate` trains dense parameters
under a mask. `indices` chooses as `topk` does from files larger than memory, without jax.
"""

from fishjax.masks._algebra import count, density, from_indices, intersection, overlap, split, union
from fishjax.masks._baselines import bitfit, by_name, magnitude, movement, random, saliency
from fishjax.masks._gate import GateState, apply_updates, gate
from fishjax.masks._topk import indices, topk

__all__ = [
    "GateState",
    "apply_updates",
    "bitfit",
    "by_name",
    "count",
    "density",
    "from_indices",
    "gate",
    "indices",
    "intersection",
    "magnitude",
    "movement",
    "overlap",
    "random",
    "saliency",
    "split",
    "topk",
    "union",
]
