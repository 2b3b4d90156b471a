"""LayerNorm tuning: only the norms are trained (arXiv 2312.11420)."""

from collections.abc import Sequence

from fishjax.patches._dense import Dense, init_dense
from fishjax.types import Params

# `layer_norm`, `LayerNorm`, `input_layernorm`, `q_norm`, `ln_1`, `LayerNorm_0` ...: every family's way.
_NORMS = r"(?i)(norm|(^|\.)ln)(_\w+)?\.(weight|bias|scale|gamma|beta)$"


def init_norms(params: Params, *, always: str | Sequence[str] = ()) -> dict[str, Dense]:
    """Start a patch that trains the scales and offsets of every norm; at the start it changes nothing.

    Args:
      params: the base.
      always: regexes of other leaves to train whole, such as those of a new head.

    Raises:
      UsageError: nothing is called a norm, or a regex matches no leaf.

    References: Zhao et al. 2023, arXiv 2312.11420, section 3.

    >>> import jax.numpy as jnp
    >>> list(init_norms({"ln_f": {"weight": jnp.ones(2)}, "head": {"weight": jnp.ones((2, 2))}}))
    ['ln_f.weight']
    """
    more = [always] if isinstance(always, str) else list(always)
    return init_dense(params, [_NORMS, *more])
