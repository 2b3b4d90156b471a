"""Dense: a leaf that is replaced whole."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import StructureError
from fishjax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """New values for a whole leaf."""

    values: Array  # [*p], the new leaf

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None."""
        if self.values.shape != leaves[name].shape:
            return f"its values are {tree.describe(self.values)}, the leaf {tree.describe(leaves[name])}"
        return None

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaves that change, by name."""
        return {name: self.values.astype(leaves[name].dtype)}


def init_dense(params: Params, targets: str | Sequence[str] = "") -> dict[str, Dense]:
    """Start a patch that trains whole leaves: full fine-tuning, or BitFit with `targets="bias$"`.

    Args:
      params: the base; its leaves are the starting values.
      targets: regexes of leaf names; every leaf by default.

    Raises:
      UsageError: a regex matches no leaf.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> list(init_dense(params, "bias"))
    ['bias']
    """
    flat = tree.flatten(params)
    chosen = tree.select(targets, flat)
    odd = [n for n in flat if n in chosen and not tree.is_inexact(flat[n])]
    if odd:
        raise StructureError(f"only floating-point leaves can be trained; `{odd[0]}` is {flat[odd[0]].dtype}")
    return {n: Dense(jnp.asarray(x)) for n, x in flat.items() if n in chosen}
