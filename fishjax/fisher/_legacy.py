"""Two estimators that are widely used under the name of Fisher and are none: for reproduction only.

Both square the gradient of a whole batch, so the cross terms between examples stay in, and the result
depends on how the data is split into batches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fishjax.fisher._estimators import FisherEstimator, FisherState, batch_size, finalize, init
from fishjax.fisher._squares import square
from fishjax.types import Array, LogitsFn


def legacy_sqrt_sum(logits_fn: LogitsFn) -> FisherEstimator:
    """Square the batch gradient of sum_b sum_y sqrt(p_y) log p_y: not a Fisher, whatever its users say.

    For two classes and one example it is the Fisher times (sqrt(p_1) - sqrt(p_0))^2: zero at p = 1/2,
    where the Fisher is largest. Use `exact`.

    >>> import jax.numpy as jnp
    >>> from fishjax import fisher
    >>> broken = fisher.legacy_sqrt_sum(lambda params, x: params * x)
    >>> fisher.estimate(broken, jnp.zeros(2), [jnp.ones((1, 2))]).tolist()
    [0.0, 0.0]
    """

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(0.5 * log_p)) * log_p)

    return _of_batches(logits_fn, loss, count=lambda size: size)


def legacy_argmax(logits_fn: LogitsFn) -> FisherEstimator:
    """Square the batch gradient of the mean of -log p at the model's own best label: not a Fisher.

    Use `sampled`, which draws the label.

    >>> import jax.numpy as jnp
    >>> from fishjax import fisher
    >>> broken = fisher.legacy_argmax(lambda params, x: params * x)
    >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    >>> # It depends on the split into batches:
    >>> [fisher.estimate(broken, jnp.zeros(2), b).tolist() for b in ([x], [x[:1], x[1:]])]
    [[0.0, 0.0], [0.25, 0.25]]
    """

    def loss(logits):
        label = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=logits.dtype)
        return -jnp.sum(label * jax.nn.log_softmax(logits)) / logits.shape[0]

    return _of_batches(logits_fn, loss, count=lambda size: 1)


def _of_batches(
    logits_fn: LogitsFn, loss: Callable[[Array], Array], count: Callable[[int], int]
) -> FisherEstimator:
    def update(state, params, batch, key=None, *, sharding=None):  # one gradient: `jit` divides the work
        size = batch_size(batch)
        gradient = jax.grad(lambda p: loss(jax.vmap(logits_fn, (None, 0))(p, batch)))(params)
        total = jax.tree.map(lambda t, g: t + square(g), state.total, gradient)
        return FisherState(total, state.count + count(size), state.silent)

    return FisherEstimator(init, update, finalize)
