"""Sparse: new values at few entries of a leaf, the kind that a FISH mask trains (arXiv 2111.09839)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.types import Array, Mask, Params

_ADVICE = "more than 32 bits count; set JAX_ENABLE_X64=1, or apply the patch from file to file"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """New values (not differences: in bfloat16 1 + 0.001 is 1) at flat positions of a leaf."""

    indices: Array  # int32, int64 for 2^31 entries and more, [N]: increasing positions in C order
    values: Array  # [N], the new entries; kept in float32 while a bfloat16 leaf is trained

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None; contents only when they are concrete."""
        size = leaves[name].size
        if size > np.iinfo(index_dtype(size)).max:
            return f"it has {size} entries, {_ADVICE}"
        if self.indices.ndim != 1 or self.indices.shape != self.values.shape:
            return (
                f"{tree.describe(self.indices)} indices and {tree.describe(self.values)} values do not pair"
            )
        if isinstance(self.indices, jax.core.Tracer) or self.indices.size == 0:
            return None
        indices = np.asarray(self.indices).astype(np.int64)
        if (indices[1:] <= indices[:-1]).any():  # a difference could overflow
            return "its indices are not strictly increasing"
        if indices[0] < 0 or indices[-1] >= size:
            return f"its indices reach from {indices[0]} to {indices[-1]}, the leaf has {size} entries"
        return None

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaves that change, by name."""
        weight = jnp.asarray(leaves[name])
        new = (
            weight.reshape(-1)
            .at[self.indices]
            .set(self.values.astype(weight.dtype), mode="drop", indices_are_sorted=True, unique_indices=True)
        )
        new, sharding = new.reshape(weight.shape), None
        if not isinstance(weight, jax.core.Tracer):  # the detour over flat positions may lose it
            sharding = weight.sharding if isinstance(weight.sharding, jax.sharding.NamedSharding) else None
        return {name: new if sharding is None else jax.device_put(new, sharding)}


def init_sparse(params: Params, mask: Mask) -> dict[str, Sparse]:
    """Start a patch that trains the entries that a mask keeps; at the start it changes nothing.

    Values are in max(float32, dtype of the leaf): steps too small for bfloat16 add up. `apply` and
    files round them once to the leaf's dtype.

    Args:
      params: the base, leaves `[*p]`.
      mask: bool `[*p]` for every leaf, concrete.

    Raises:
      StructureError: the mask has other leaves, or is not of bools.

    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> init_sparse(params, {"w": jnp.array([[False, True], [False, False]])})["w"].indices
    Array([1], dtype=int32)
    """
    tree.check_same(params, mask, ("params", "mask"), dtypes=False)
    masks = tree.flatten(mask)
    patch = {}
    for name, weight in tree.flatten(params).items():
        kept = np.asarray(masks[name])
        if kept.dtype != bool:
            raise StructureError(f"a mask must be of bools; `{name}` is {kept.dtype}")
        where = np.flatnonzero(kept)
        if where.size and not tree.is_inexact(weight):
            raise StructureError(f"only floating-point leaves can be trained; `{name}` is {weight.dtype}")
        dtype = index_dtype(weight.size)
        if where.size and weight.size > np.iinfo(dtype).max:
            raise StructureError(f"`{name}` has {weight.size} entries, {_ADVICE}")
        if where.size:
            values = np.asarray(weight).reshape(-1)[where]  # on the host: no program to compile for each leaf
            values = values.astype(tree.wide_dtype(values.dtype))  # of bfloat16 leaves: float32 masters
            patch[name] = Sparse(jnp.asarray(where.astype(dtype)), jnp.asarray(values))
    if not patch:
        raise UsageError("`mask` keeps no entry; a patch must train something")
    return patch


def index_dtype(size: int) -> Any:
    """Return the dtype that counts so many entries, as far as jax has it."""
    config: Any = jax.config
    return jnp.int64 if size > np.iinfo(np.int32).max and config.jax_enable_x64 else jnp.int32
