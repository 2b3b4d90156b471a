"""Task arithmetic: what models changed is added to, or taken from, a base; and the path between two."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fishjax.errors import UsageError
from fishjax.merge._rule import (
    Block,
    Options,
    Rule,
    add_up,
    check_weights,
    deltas,
    flag,
    number,
    only,
    scaled,
    times,
)
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def task_arithmetic(
    models: Sequence[Params],
    *,
    base: Params,
    weights: Any = None,
    scale: float = 1.0,
    normalize: bool = False,
    keep: Keep | None = None,
) -> Params:
    """Return the base plus scaled changes, theta_0 + scale * sum w_i (theta_i - theta_0).

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all models started from.
      weights: one finite number a model, 1 each by default; a negative one unlearns that change.
      scale: what the sum is multiplied with.
      normalize: divide the weights by their sum.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: wrong weights or scale; with `normalize`, weights of sum zero.

    >>> import numpy as np
    >>> float(task_arithmetic([{"w": np.float32(3)}], base={"w": np.float32(1)}, weights=[-1])["w"])
    -1.0

    References: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089, section 2.
    """
    options = {"weights": weights, "scale": scale, "normalize": normalize}
    return merge_trees(TASK_ARITHMETIC, models, base=base, keep=keep, **options)


def wise_ft(models: Sequence[Params], *, base: Params, alpha: float, keep: Keep | None = None) -> Params:
    """Return the point at alpha on the straight path from a base to its fine-tuned model.

    Args:
      models: one tree, the fine-tuned model.
      base: the tree that it started from.
      alpha: 0 is the base, 1 the fine-tuned model; both come out bit by bit.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: model and base differ in names or shapes.
      UsageError: more than one model, or alpha outside [0, 1].

    >>> import numpy as np
    >>> float(wise_ft([{"w": np.float32(4)}], base={"w": np.float32(0)}, alpha=0.25)["w"])
    1.0

    References: Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, equation 1.
    """
    return merge_trees(WISE_FT, models, base=base, keep=keep, alpha=alpha)


def check_sum(n: int, weights: Any, scale: Any, *, elect: bool, normalize: bool) -> Options:
    """Return the checked options of `combined` and its scale; weights are divided by their sum here."""
    elect, normalize = flag("elect", elect), flag("normalize", normalize)
    weights = check_weights(weights, n, zero_sum=not normalize, negative=not elect)
    if normalize and not elect:
        mass = add_up(weights)
        weights = [w / mass for w in weights]
    return {"weights": weights, "scale": number("scale", scale), "elect": elect, "normalize": normalize}


def combined(changes: Iterable[Array], weights: Sequence[Any], *, elect: bool, normalize: bool) -> Array:
    """Return the weighted sum of changes; with `elect` of those only whose sign is that of the sum.

    What is elected is divided by the weights of those who agree if `normalize` is set. The changes are
    written over, where they are numpy's.
    """
    weighted = [scaled(d, w) for w, d in zip(weights, changes, strict=True)]
    if not elect:
        return add_up(weighted, over=True)
    positive = add_up(weighted) >= 0
    agree = [((d > 0) == positive) & (d != 0) for d in weighted]
    total = add_up([only(d, a) for d, a in zip(weighted, agree, strict=True)], over=True)
    if normalize:
        total /= _mass(agree, weights, total.dtype)
    return total


def _mass(agree: Sequence[Array], weights: Sequence[Any], dtype: Any) -> Array:
    """Return the weights of those who agree, one where nobody does; weights of one are counted in bytes."""
    if len(agree) < 256 and all(isinstance(w, float) and w == 1 for w in weights):
        mass = add_up([a.astype(np.uint8) for a in agree], over=True)
    else:
        mass = add_up([scaled(a.astype(dtype), w) for a, w in zip(agree, weights, strict=True)], over=True)
    mass += (mass <= 0).astype(mass.dtype)
    return mass.astype(dtype, copy=False)


def moved(block: Block, scale: Any, change: Array) -> Array:
    """Return the base plus a scaled change, which numpy writes over."""
    return add_up([scaled(change, scale), block.base], over=True)


def _check(n: int, *, weights: Any, scale: float, normalize: bool) -> Options:
    return check_sum(n, weights, scale, elect=False, normalize=normalize)


def _leaf(block: Block, *, weights: Sequence[Any], scale: Any, **_: Any) -> Array:
    return moved(block, scale, combined(deltas(block), weights, elect=False, normalize=False))


def _check_path(n: int, *, alpha: float) -> Options:
    if n != 1:
        raise UsageError(f"`models` must be the one fine-tuned model; got {n}")
    return {"alpha": number("alpha", alpha, 0, 1)}


def _path(block: Block, *, alpha: Any) -> Array:
    return times(1 - alpha, block.base) + times(alpha, block.models[0])


TASK_ARITHMETIC = Rule(_leaf, _check, needs_base=True)
WISE_FT = Rule(_path, _check_path, needs_base=True)
