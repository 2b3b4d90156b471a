"""BitFit: only biases are trained (arXiv 2106.10199)."""

from collections.abc import Sequence

from fishjax.patches._dense import Dense, init_dense
from fishjax.types import Params


def init_bitfit(params: Params, *, always: str | Sequence[str] = ()) -> dict[str, Dense]:
    """Start a patch that trains every bias; at the start it changes nothing.

    Args:
      params: the base; biases are the leaves called `bias`, and `beta` in old checkpoints of BERT.
      always: regexes of other leaves to train whole, such as those of a new head.

    Raises:
      UsageError: nothing is called a bias (T5 has none), or a regex matches no leaf.

    References: Ben Zaken et al. 2022, arXiv 2106.10199, section 3.

    >>> import jax.numpy as jnp
    >>> list(init_bitfit({"head": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}}))
    ['head.bias']
    """
    more = [always] if isinstance(always, str) else list(always)
    return init_dense(params, [r"(^|[._])(bias|beta)$", *more])
