"""Merging by uncertainty-based gradient matching: task arithmetic with everybody's precision."""

from collections.abc import Sequence
from typing import Any

from fishjax.merge._rule import Block, Options, Rule, check_weights, deltas, number, times
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Fisher, Params


def gradient_matching(
    models: Sequence[Params],
    *,
    base: Params,
    fishers: Sequence[Fisher],
    base_fisher: Fisher,
    weights: Any = None,
    floor: float = 1e-6,
    keep: Keep | None = None,
) -> Params:
    """Return theta_0 + sum a_i (H_0 + H_i) / H (theta_i - theta_0), H = H_0 + sum a_i H_i.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all models started from.
      fishers: H_i, one diagonal Fisher a model, >= 0.
      base_fisher: H_0, the Fisher of the base on its own data, plus the precision of the prior.
      weights: a_i, one finite number >= 0 a model, 1 each by default.
      floor: the least value of H_0, > 0, in the unit of the Fishers.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: trees differ in names or shapes.
      UsageError: a Fisher that is negative or not finite; wrong weights or floor.

    >>> import numpy as np
    >>> w, one = {"w": np.float32(2)}, {"w": np.float32(1)}
    >>> gradient_matching([w], base=one, fishers=[one], base_fisher=one)["w"]
    np.float32(2.0)

    References: Daheim et al., "Model merging by uncertainty-based gradient matching", arXiv
    2310.12808, equation 12.
    """
    near = {"fishers": fishers, "base_fisher": base_fisher}
    return merge_trees(
        GRADIENT_MATCHING, models, base=base, beside=near, keep=keep, weights=weights, floor=floor
    )


def _check(n: int, *, weights: Any, floor: float) -> Options:
    return {"weights": check_weights(weights, n, negative=False), "floor": number("floor", floor, 1e-30)}


def _leaf(block: Block, *, weights: Sequence[Any], floor: float) -> Array:
    xp = block.models[0].__array_namespace__()
    own, (origin,) = block.beside["fishers"], block.beside["base_fisher"]
    origin = xp.maximum(origin, xp.asarray(floor, dtype=own[0].dtype))
    # Each sum takes one product at a time. Of a sum of two products a compiler may fuse either with the
    # addition, and does not choose alike for a whole array and for a shard of it.
    whole, merged = origin, block.base
    for w, f in zip(weights, own, strict=True):
        whole = whole + times(w, f)
    for w, f, d in zip(weights, own, deltas(block), strict=True):
        merged = merged + times(w, (origin + f) / whole) * d
    return merged


GRADIENT_MATCHING = Rule(_leaf, _check, needs_base=True, beside=("fishers", "base_fisher"))
