"""Which leaves of a tree are kept in eight or four bits, and along which axis their groups lie."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves._codec import FORMATS
from fishjax.leaves._interpreter import is_leaf
from fishjax.leaves._quantised import quantised
from fishjax.types import Params

How = str | Mapping[str, Any] | None
Formats = str | tree.Rules[How]

# Tables that are added to activations or scores are small, and their errors are not averaged away.
_KEPT = r"relative_attention_bias|position|wpe|token_type|norm"
_CONV1D = r"\.(c_attn|c_fc|c_proj)\.weight$"  # GPT-2's `[in, out]`


def quantise(params: Params, to: Formats) -> Params:
    """Return parameters whose matrices are kept in eight or four bits, as leaves for any JAX function.

    `model.apply` and `model.generate` of `models` take them as they are, any other function through
    `leaves.interpret`, and `patches.unfolded` trains LoRA and (IA)^3 on top of them.

    Args:
      params: nested dicts of arrays `[*p]`; leaves that are no arrays stay as they are.
      to: "int8", "int4" or "nf4": all matrices called `weight` or `kernel` but tables of positions, groups
        along the axis that a product contracts. Or rules `(regex, how)`, the first match wins, what none
        matches stays: `how` is a format, None (stays), or arguments of `quantised`.

    Raises:
      UsageError: an unknown format, a rule that matches no leaf, nothing to quantise, a weight that is
        not finite.

    >>> params = quantise({"a": {"weight": jnp.ones((6, 8)), "bias": jnp.ones(6)}}, "nf4")
    >>> params["a"]["weight"].nbytes, params["a"]["bias"].nbytes
    (48, 24)
    """
    flat = tree.flatten(params)
    make = quantiser(to, flat)
    return tree.rebuild(params, {n: x if is_leaf(x) else make(n, x) for n, x in flat.items()})


def quantiser(to: Formats, like: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Return `make(name, array) -> leaf or the array`, by the names and shapes of all leaves.

    Raises:
      UsageError: as for `quantise`.
    """
    if isinstance(to, str):
        if to not in FORMATS:
            raise UsageError(f"`quantise` must be one of {', '.join(FORMATS)}, or rules; got `{to}`")
        how: dict[str, How] = {n: {"format": to, "axis": a} for n, x in like.items() if (a := _axis(n, x))}
        if not how:
            raise UsageError(
                "no leaf is a matrix called `weight` or `kernel`, so nothing would be quantised; "
                "give rules: [(regex, format), ...]"
            )
    else:
        how = tree.match(to, like)

    def make(name: str, x: Any) -> Any:
        wanted = how.get(name)
        if wanted is None:
            return x
        leaf = quantised(x, **({"format": wanted} if isinstance(wanted, str) else wanted), name=name)
        if not jnp.isfinite(leaf.scales).all():
            raise UsageError(f"`{name}` holds entries that are not finite; it cannot be quantised")
        return leaf

    return make


def _axis(name: str, x: Any) -> int | None:
    """Return the axis that a product contracts, from the end; None for what stays as it is."""
    ndim = len(x.shape)
    if ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating) or re.search(_KEPT, name):
        return None
    if re.search(_CONV1D, name):
        return -2
    if name.endswith("kernel"):  # inputs come before outputs; of several axes of inputs the longest
        return max(range(-ndim, -1), key=lambda d: x.shape[d])
    return -1 if name.endswith("weight") else None
