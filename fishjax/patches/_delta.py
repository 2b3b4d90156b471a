"""Delta: changes in eight bits, what `save_patch(lossy="int8")` makes of sparse and dense kinds."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.patches._sparse import Sparse
from fishjax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """Changes code * scale of few or all entries of a leaf, a scale for each block of codes.

    Where scales are powers of two, as in files, the product is exact, and the sum is rounded once.
    """

    codes: Array  # int8 [N]
    scales: Array  # [ceil(N / block)], float32 or wider
    indices: Array | None = None  # int32 [N], strictly increasing positions in C order; None: all of them
    block: int = dataclasses.field(default=64, metadata={"static": True})

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None; contents only when they are concrete."""
        if self.codes.ndim != 1 or self.scales.shape != (-(-self.codes.size // self.block),):
            return (
                f"{tree.describe(self.codes)} codes in blocks of {self.block} and "
                f"{tree.describe(self.scales)} scales do not pair"
            )
        if self.indices is not None:
            return Sparse(self.indices, self.codes).problem(name, leaves)
        size = leaves[name].size
        return None if self.codes.size == size else f"it has {self.codes.size} codes, the leaf {size} entries"

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaf that changes, by name."""
        weight = jnp.asarray(leaves[name])
        wide = tree.wide_dtype(weight.dtype)
        scales = jnp.repeat(self.scales.astype(wide), self.block)[: self.codes.size]
        delta = self.codes.astype(wide) * scales
        if self.indices is None:
            return {name: (weight.astype(wide) + delta.reshape(weight.shape)).astype(weight.dtype)}
        old = weight.reshape(-1)[self.indices].astype(wide)
        return Sparse(self.indices, old + delta).fold(name, leaves)
