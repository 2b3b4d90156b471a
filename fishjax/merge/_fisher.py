"""Fisher merging: every entry is averaged with the precision that each model has of it."""

import math
from collections.abc import Sequence
from typing import Any

from fishjax.errors import UsageError
from fishjax.merge._rule import Block, Options, Rule, check_weights, flag, number, times, whole_number
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Fisher, Params


def fisher(
    models: Sequence[Params],
    *,
    fishers: Sequence[Fisher],
    weights: Any = None,
    floor: float = 1e-6,
    normalize: bool = False,
    favor: int | None = None,
    keep: Keep | None = None,
) -> Params:
    """Return the Fisher-weighted mean of models, sum w max(F, floor) theta / sum w max(F, floor).

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      fishers: one diagonal Fisher a model, >= 0, of the model's names and shapes (leaves that are
        kept or integer may be missing).
      weights: one finite number >= 0 a model. Default: 1 each.
      floor: the least precision of an entry, >= 0, in the unit of the Fishers.
      normalize: divide each Fisher (floored) by its Euclidean norm over all merged leaves, so that
        a confident model does not drown the others. The norm is that of the raw Fisher.
      favor: the model whose value holds where no model knows anything: only its Fisher is floored.
        Where the denominator is zero nevertheless, the entry is that of model `favor` (default 0).
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or Fishers differ in names or shapes, models in dtypes or integer leaves.
      UsageError: a Fisher that is negative or not finite; wrong weights, floor or favor.

    >>> import numpy as np
    >>> models = [{"w": np.float32(0)}, {"w": np.float32(4)}]
    >>> fishers = [{"w": np.float32(3)}, {"w": np.float32(1)}]
    >>> float(fisher(models, fishers=fishers)["w"])
    1.0

    References: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv
    2111.09832, equation 4 (weights, floor and normalisation: section 3).
    """
    options = {"weights": weights, "floor": floor, "normalize": normalize, "favor": favor}
    return merge_trees(FISHER, models, beside={"fishers": fishers}, keep=keep, **options)


def _check(n: int, *, weights: Any, floor: float, normalize: bool, favor: int | None) -> Options:
    if favor is not None and not 0 <= whole_number("favor", favor) < n:
        raise UsageError(f"`favor` must be the number of a model, 0 to {n - 1}; got {favor}")
    weights = check_weights(weights, n, negative=False)
    return {
        "weights": weights,
        "floor": number("floor", floor, 0),
        "normalize": flag("normalize", normalize),
        "favor": favor,
    }


def _squares(block: Block, *, normalize: bool, **_: Any) -> list[Array]:
    return [f * f for f in block.beside["fishers"]] if normalize else []


def _leaf(block: Block, *, weights: Sequence[Any], floor: float, normalize: bool, favor: int | None) -> Array:
    # A running weighted mean: the same formula, but its ratios are in [0, 1], so products of tiny or
    # huge Fishers leave no range, and where one model alone knows an entry its value comes out exactly.
    xp = block.models[0].__array_namespace__()
    least = block.models[0].dtype.type(floor)
    if normalize:
        weights = [_per_norm(w, s, i) for i, (w, s) in enumerate(zip(weights, block.measured, strict=True))]
    masses = [
        times(w, xp.maximum(f, least) if favor in (None, i) else f)
        for i, (w, f) in enumerate(zip(weights, block.beside["fishers"], strict=True))
    ]
    sure = floor > 0 and favor is None and all(isinstance(w, float) and w > 0 for w in weights)
    mean, mass = block.models[0], masses[0]
    if favor:
        mean = xp.where(mass > 0, mean, block.models[favor])
    for x, more in zip(block.models[1:], masses[1:], strict=True):
        total = mass + more
        if sure:
            # The masses are our own here: numpy writes over them, which keeps the cache small.
            mass /= total
            mass *= mean
            more /= total
            more *= x
            mass += more
            mean = mass
        else:
            unknown = (total <= 0).astype(total.dtype)  # one where nobody knows anything: `mean` stays
            safe = total + unknown
            mean = mean * ((mass + unknown) / safe) + x * (more / safe)
        mass = total
    return mean


def _per_norm(weight: Any, squares: Any, model: int) -> Any:
    """Return a weight divided by its Fisher's norm (0 where a traced norm is: it knows nothing)."""
    if isinstance(squares, float) and isinstance(weight, float):
        if squares == 0:
            raise UsageError(
                f"the Fisher of model {model} is zero everywhere; leave it out, or do not normalise"
            )
        return weight / math.sqrt(squares)
    xp = (weight if isinstance(squares, float) else squares).__array_namespace__()
    squares = xp.asarray(squares)
    return xp.where(squares > 0, weight / xp.sqrt(xp.where(squares > 0, squares, 1)), 0)


FISHER = Rule(_leaf, _check, beside=("fishers",), sums=_squares, scope="global")
