"""The optimiser of T-Few: Adafactor with a linear schedule (arXiv 2205.05638, section 3.3 and 3.5)."""

import optax

from fishjax.errors import UsageError


def adafactor(
    learning_rate: float, steps: int, *, warmup: float = 0.06, clip: float = 1.0
) -> optax.GradientTransformation:
    """Return Adafactor that scales steps by each leaf's size, a linear warm-up and a linear decay to zero.

    Args:
      learning_rate: the highest, relative to the root mean square of each leaf; T-Few's is 3e-3.
      steps: of the whole training, at least 1.
      warmup: the share of the steps that warms up, in [0, 1).
      clip: the largest norm of the whole gradient.

    Raises:
      UsageError: an argument out of range.

    References: Shazeer and Stern 2018, arXiv 1804.04235; Liu et al. 2022, arXiv 2205.05638, section 3.3.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> state = adafactor(3e-3, steps=1000).init({"w": jnp.ones((128, 256))})
    >>> [x.shape for x in jax.tree.leaves(state) if x.size > 1]  # a matrix is remembered by rows and columns
    [(128,), (256,)]
    """
    if steps < 1 or not 0 <= warmup < 1 or not clip > 0:
        raise UsageError(
            "`steps` must be at least 1, `warmup` in [0, 1) and `clip` positive; "
            f"got {steps}, {warmup}, {clip}"
        )
    rising = int(warmup * steps)
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, learning_rate, rising),
            optax.schedules.linear_schedule(learning_rate, 0.0, steps - rising),
        ],
        [rising],
    )
    return optax.chain(optax.clip_by_global_norm(clip), optax.adafactor(schedule))
