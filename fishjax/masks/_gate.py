"""Train dense parameters under a mask: `gate` what an optimiser does, and add it up to the bit."""

from typing import TYPE_CHECKING, NamedTuple

from fishjax import tree
from fishjax.types import Mask, Params

if TYPE_CHECKING:
    import optax


class GateState(NamedTuple):
    """The mask, carried as state: an argument of the compiled step, not a constant within it."""

    mask: Mask


def gate(mask: Mask) -> "optax.GradientTransformation":
    """Let updates pass only where a mask keeps; must be the last of a chain.

    Anything before it (weight decay, momentum) may move entries that the mask freezes; after it nothing
    may. A frozen entry gets the update -0.0, the one number that leaves every bit of a sum alone; but XLA on
    a CPU counts subnormal numbers as 0 in sums: `masks.apply_updates` in place of optax's spares them too.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.5), gate({"w": jnp.array([True, False])}))
    >>> params = {"w": jnp.array([1.0, -0.0])}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([ 0.5, -0. ], dtype=float32)
    """

    import jax
    import jax.numpy as jnp
    import optax

    def init(params):
        tree.check_same(params, mask, ("params", "mask"), dtypes=False)
        return GateState(jax.tree.map(lambda m: jnp.array(m, bool), mask))

    def update(updates, state, params=None):
        del params
        gated = jax.tree.map(lambda m, u: jnp.where(m, u, jnp.array(-0.0, u.dtype)), state.mask, updates)
        return gated, state

    return optax.GradientTransformation(init, update)


def apply_updates(params: Params, updates: Params, mask: Mask) -> Params:
    """Return params + updates where a mask keeps, and every other entry as it is, to the bit.

    Args:
      params, updates: `[*p]`; the sum has the dtype of the parameters.
      mask: bool `[*p]` for every leaf.

    >>> import jax.numpy as jnp
    >>> apply_updates({"w": jnp.ones(2)}, {"w": jnp.ones(2)}, {"w": jnp.array([True, False])})["w"]
    Array([2., 1.], dtype=float32)
    """
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda p, u, m: jnp.where(m, (p + u).astype(p.dtype), p), params, updates, mask)
