"""Model Stock: how far to go from a base towards the mean of models, seen from their angles."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from fishjax.errors import UsageError
from fishjax.merge._rule import Block, Options, Rule, add_up, choice, deltas
from fishjax.merge._task import moved
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params


def model_stock(
    models: Sequence[Params], *, base: Params, keep: Keep | None = None, compat: str | None = None
) -> Params:
    """Return, leaf by leaf, t * mean + (1 - t) * base with t = N c / (1 + (N - 1) c).

    c is the cosine between two models' changes, averaged over all pairs, at least 0: where they
    point the same way t is 1, where they are at right angles nothing but the base is left.

    Args:
      models: N >= 2 trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that all started from.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.
      compat: "mergekit" lets c be negative.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: fewer than two models.

    >>> import numpy as np
    >>> a, b, base = ({"w": np.float32(x)} for x in ([1, 1], [1, 0], [0, 0]))
    >>> model_stock([a, b], base=base)["w"].round(4)  # c = 0.7071, t = 0.8284
    array([0.8284, 0.4142], dtype=float32)

    References: Jang et al., "Model Stock", arXiv 2403.19522, equation 3 (N models: section 4).
    """
    return merge_trees(MODEL_STOCK, models, base=base, keep=keep, compat=compat)


def _check(n: int, *, compat: str | None) -> Options:
    if n < 2:
        raise UsageError(f"`models` must be at least two, their angle decides; got {n}")
    return {"least": -1.0 if choice("compat", compat, ("mergekit", None)) else 0.0}


def _products(block: Block, **_: Any) -> list[Array]:
    changes = list(deltas(block))
    pairs = [a * b for a, b in itertools.combinations(changes, 2)]
    return [*(d * d for d in changes), *pairs]


def _leaf(block: Block, *, least: float) -> Array:
    n = len(block.models)
    t = _ratio(n, block.measured[:n], block.measured[n:], least)
    mean = add_up(list(deltas(block)), over=True) / n
    return moved(block, t, mean)


def _ratio(n: int, squares: Sequence[Any], products: Sequence[Any], least: float) -> Any:
    pairs = list(zip(products, itertools.combinations(squares, 2), strict=True))
    if all(isinstance(s, float) for s in squares):
        cosines = [ab / math.sqrt(aa * bb) if aa * bb > 0 else 0.0 for ab, (aa, bb) in pairs]
        cosine = max(least, math.fsum(cosines) / len(cosines))
        if abs(1 + (n - 1) * cosine) < 1e-6:
            return 0.0
        return n * cosine / (1 + (n - 1) * cosine)
    import jax.numpy as jnp

    exist = [(aa > 0) & (bb > 0) for _, (aa, bb) in pairs]
    cosines = [
        jnp.where(s, ab / jnp.where(s, jnp.sqrt(aa) * jnp.sqrt(bb), 1), 0)
        for s, (ab, (aa, bb)) in zip(exist, pairs, strict=True)
    ]
    mean = jnp.maximum(add_up(cosines) / len(cosines), least)
    whole = 1 + (n - 1) * mean
    some = abs(whole) >= 1e-6
    return jnp.where(some, n * mean / jnp.where(some, whole, 1), 0)


MODEL_STOCK = Rule(_leaf, _check, needs_base=True, sums=_products)
