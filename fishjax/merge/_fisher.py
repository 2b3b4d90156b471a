"""Fisher merging: every entry is averaged with the precision that each model has of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.merge._rule import Block, Rule, add_up, check_weights, is_traced, times
from fishjax.merge._trees import Keep, kept_leaves, merge_trees
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
    n = len(models)
    if len(fishers) != n:
        raise UsageError(f"`fishers` must hold one Fisher for each of the {n} models; got {len(fishers)}")
    weights = check_fisher_options(weights, n, floor=floor, favor=favor)
    flats = [tree.flatten(f) for f in fishers]
    kept = kept_leaves([tree.flatten(m) for m in models], keep)
    merged = [{name: x for name, x in flat.items() if name not in kept} for flat in flats]
    for i, flat in enumerate(merged):
        for name, x in flat.items():
            check_precision(name, x, i)
    if normalize:
        weights = normalized(weights, [_norm(list(flat.values())) for flat in merged])
    return merge_trees(
        FISHER, models, fishers=fishers, keep=keep, weights=weights, floor=float(floor), favor=favor
    )


def check_fisher_options(weights: Any, n: int, *, floor: float, favor: int | None) -> list[Any]:
    """Return the checked weights of a Fisher merge of n models."""
    weights = check_weights(weights, n)
    if any(isinstance(w, float) and w < 0 for w in weights):
        raise UsageError(f"`weights` of a Fisher merge must be >= 0, precision is; got {weights}")
    if not (math.isfinite(floor) and floor >= 0):
        raise UsageError(f"`floor` must be a finite number >= 0; got {floor}")
    if favor is not None and not 0 <= favor < n:
        raise UsageError(f"`favor` must be the number of a model, 0 to {n - 1}; got {favor}")
    return weights


def check_precision(name: str, x: Array, model: int) -> None:
    """Raise unless a Fisher's values are finite and >= 0 (a traced one cannot be looked at)."""
    fine = ((x >= 0) & (x < math.inf)).all()
    if not is_traced(fine) and not bool(fine):
        raise UsageError(f"the Fisher of model {model} must be finite and >= 0; `{name}` is not everywhere")


def normalized(weights: Sequence[Any], norms: Sequence[Any]) -> list[Any]:
    """Return each weight divided by its Fisher's norm.

    Raises:
      UsageError: a norm is zero (a traced one then gives the weight 0: that model knows nothing).
    """
    divided = []
    for i, (w, norm) in enumerate(zip(weights, norms, strict=True)):
        if isinstance(norm, float):
            if norm == 0:
                raise UsageError(
                    f"the Fisher of model {i} is zero everywhere and cannot be normalised; leave it out"
                )
            divided.append(w / norm)
        else:
            xp = norm.__array_namespace__()
            divided.append(xp.where(norm > 0, w / xp.where(norm > 0, norm, 1), 0))
    return divided


def _norm(leaves: Sequence[Array]) -> Any:
    """Return the Euclidean norm over all leaves: a float (summed in float64), or a traced scalar."""
    if any(is_traced(x) for x in leaves):
        xp = leaves[0].__array_namespace__()
        return xp.sqrt(add_up([(x.astype(np.float32) ** 2).sum() for x in leaves]))
    return math.sqrt(math.fsum(float((np.asarray(x, np.float64) ** 2).sum()) for x in leaves))


def _leaf(block: Block, *, weights: Sequence[Any], floor: float, favor: int | None) -> Array:
    # A running weighted mean: the same formula, but its ratios are in [0, 1], so products of tiny or
    # huge Fishers leave no range, and where one model alone knows an entry its value comes out exactly.
    xp = block.models[0].__array_namespace__()
    one = xp.asarray(1, dtype=block.models[0].dtype)
    masses = [
        times(w, xp.maximum(f, xp.asarray(floor, dtype=f.dtype)) if favor in (None, i) else f)
        for i, (w, f) in enumerate(zip(weights, block.fishers, strict=True))
    ]
    mean, mass = block.models[0], masses[0]
    if favor:
        mean = xp.where(mass > 0, mean, block.models[favor])
    for x, more in zip(block.models[1:], masses[1:], strict=True):
        total = mass + more
        known = total > 0
        safe = xp.where(known, total, one)
        mean = mean * (xp.where(known, mass, one) / safe) + x * (more / safe)
        mass = total
    return mean


FISHER = Rule(_leaf, needs_fishers=True)
