"""Averaging: the isotropic merge of the literature on Fisher merging, the uniform soup of others."""

from collections.abc import Sequence
from typing import Any

from fishjax.merge._rule import Block, Options, Rule, add_up, check_weights, flag, times
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def average(
    models: Sequence[Params], *, weights: Any = None, normalize: bool = True, keep: Keep | None = None
) -> Params:
    """Return the weighted mean of models, sum w theta / sum w.

    Args:
      models: trees with the same names, shapes and dtypes; integer leaves must be equal.
      weights: one finite number a model, in any unit: they are divided by their sum. Default: equal.
      normalize: False takes the weights as they are.
      keep: ordered `(regex of a leaf's name, i)`: such leaves are taken whole from model i, as they
        are there (absent, if they are absent there); i None: merged. A head that only one model
        has, or whose shapes differ, needs such a rule.

    Raises:
      StructureError: models differ in names, shapes, dtypes or integer leaves.
      UsageError: weights of wrong number, not finite or of sum zero; a rule that matches nothing.

    >>> import numpy as np
    >>> float(average([{"w": np.float32(1)}, {"w": np.float32(4)}], weights=[2, 1])["w"])
    2.0

    References: Wortsman et al., "Model soups", arXiv 2203.05482, recipe 1; Matena and Raffel,
    arXiv 2111.09832, section 2.2 (isotropic merging).
    """
    return merge_trees(AVERAGE, models, keep=keep, weights=weights, normalize=normalize)


def _check(n: int, *, weights: Any, normalize: bool) -> Options:
    normalize = flag("normalize", normalize)
    weights = check_weights(weights, n, zero_sum=not normalize)
    if normalize and all(isinstance(w, float) and w == weights[0] for w in weights):
        weights = [1.0] * n  # equal weights cancel, and then only the sum is rounded
    return {"weights": weights, "normalize": normalize}


def _leaf(block: Block, *, weights: Sequence[Any], normalize: bool) -> Array:
    terms = [times(w, x) for w, x in zip(weights, block.models, strict=True)]
    if not normalize:
        return add_up(terms)
    mass = add_up(weights)
    return add_up(terms) / (mass if isinstance(mass, float) else mass.astype(terms[0].dtype))


AVERAGE = Rule(_leaf, _check)
