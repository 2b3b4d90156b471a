"""RegMean: linear layers merged so that their outputs change least on everybody's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._average import average
from fishjax.merge._rule import add_up, number
from fishjax.merge._trees import Keep
from fishjax.types import Array, Params


def regmean(
    models: Sequence[Params],
    *,
    grams: Sequence[Mapping[str, Array]],
    alpha: float = 0.9,
    axis: int = -1,
    keep: Keep | None = None,
) -> Params:
    """Return models whose weights solve a linear regression, (sum G_i)^-1 sum G_i W_i; the rest averaged.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      grams: for each model `{name of a weight: [n, n]}`, the sum of x x^T over the inputs x `[n]` that
        the weight meets; the same names for all models. Other leaves are averaged.
      alpha: what G's entries off the diagonal are multiplied with, [0, 1]; 0.9 in the paper, 0.1 for T5.
      axis: the weights' input axis: -1 for checkpoints (`[out, in]`), 0 for Flax (`[in, out]`).
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Returns:
      The merged tree; solved in float64 on the host, so not for use under `jit`.

    Raises:
      StructureError: a Gram matrix that fits no weight, is not symmetric or not of its size.
      UsageError: wrong alpha, or Gram matrices of other weights.

    References: Jin et al., "Dataless knowledge fusion", arXiv 2212.09849, equation 3.

    >>> one = {"w": np.eye(2, dtype=np.float32)}
    >>> two = {"w": 3 * np.eye(2, dtype=np.float32)}
    >>> grams = [{"w": np.diag([1.0, 3.0])}, {"w": np.diag([1.0, 1.0])}]
    >>> regmean([one, two], grams=grams)["w"]
    array([[2. , 0. ],
           [0. , 1.5]], dtype=float32)
    """
    if len(grams) != len(models):
        raise UsageError(f"`grams` must be one for each of the {len(models)} models; got {len(grams)}")
    alpha = number("alpha", alpha, 0, 1)
    merged = average(models, keep=keep)
    flat, flats = tree.flatten(merged), [tree.flatten(m) for m in models]
    for i, found in enumerate(grams):
        if set(found) != set(grams[0]):
            raise UsageError(f"`grams` of models 0 and {i} are of other weights; they must be of the same")
    kept = {n for n, i in tree.match(keep or [], flat).items() if i is not None} if keep else set()
    for name in grams[0]:
        if name not in flat:
            raise StructureError(f"there is a Gram matrix for `{name}`, which the models do not have")
        if name not in kept:
            flat[name] = _solve(name, [f[name] for f in flats], [g[name] for g in grams], alpha, axis)
    return tree.rebuild(merged, flat)


def _solve(name: str, weights: Sequence[Array], grams: Sequence[Array], alpha: float, axis: int) -> Any:
    first = weights[0]
    if not -first.ndim <= axis < first.ndim:
        raise StructureError(f"`{name}` is {tree.describe(first)} and has no axis {axis}")
    size = first.shape[axis]
    scaled = []
    for i, gram in enumerate(grams):
        g = np.asarray(gram, np.float64)
        if g.shape != (size, size) or not np.allclose(g, g.T, rtol=1e-4, atol=1e-6 * abs(g).max(initial=0)):
            raise StructureError(
                f"the Gram matrix of `{name}` in model {i} must be symmetric [{size}, {size}]"
            )
        scaled.append(alpha * g + (1 - alpha) * np.diag(np.diag(g)))
    rows = [np.moveaxis(np.asarray(w).astype(np.float64), axis, 0).reshape(size, -1) for w in weights]
    right = add_up([g @ w for g, w in zip(scaled, rows, strict=True)])
    # The least change of the mean: inputs that nobody saw leave the average as it is.
    mean = add_up(rows) / len(rows)
    total = add_up(scaled)
    solved = mean + np.linalg.lstsq(total, right - total @ mean, rcond=None)[0]
    moved = [size, *(n for d, n in enumerate(first.shape) if d != axis % first.ndim)]
    result = np.moveaxis(solved.reshape(moved), 0, axis).astype(first.dtype)
    return first.__array_namespace__().asarray(result)
