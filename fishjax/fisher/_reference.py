"""The reference way: one gradient per example, squared inside the `vmap`, then summed."""

import jax
import jax.numpy as jnp

from fishjax.fisher._scores import Scores
from fishjax.fisher._squares import square
from fishjax.types import Array, Batch, Fisher, Params


def add_squares(
    scores: Scores, params: Params, total: Fisher, batch: Batch, keys: Array | None, counts: Array
) -> Fisher:
    """Return `total + sum_i sum_k (J_i^T s_ik)^2` over one micro-batch.

    Args:
      total: like `params`, in max(float32, dtype).
      keys: one key an example, or None where the scores draw nothing.
      counts: bool `[B]`, False for an example that only pads the micro-batch.
    """

    def one(example, key, count_it):
        out, pullback = jax.vjp(lambda p: scores.output(p, example), params)

        def row(k):
            s = scores.row(out, example, key, k)
            (gradient,) = pullback(jnp.where(count_it, s, 0).astype(out.dtype))
            return jax.tree.map(square, gradient)

        return sum_rows(row, scores.rows(out.shape))

    return jax.tree.map(lambda t, x: t + x.sum(0), total, jax.vmap(one)(batch, keys, counts))


def sum_rows(row, count: int):
    """Return the sum of `row(k)` for k below `count`, one at a time: compiled once, not unrolled."""
    if count == 1:
        return row(0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(row, 0))
    return jax.lax.scan(lambda t, k: (jax.tree.map(jnp.add, t, row(k)), None), zero, jnp.arange(count))[0]
