"""The patch between two sets of parameters."""

import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.patches._dense import Dense
from fishjax.patches._sparse import Sparse, index_dtype
from fishjax.types import Mask, Params, Patch


def diff(base: Params, tuned: Params, *, mask: Mask | None = None) -> Patch:
    """Return the patch that turns `base` into `tuned`, bit for bit.

    Bits are compared, so -0.0 differs from 0.0. Each changed leaf is stored sparse or dense, whichever
    is smaller; unchanged leaves are absent.

    Args:
      base, tuned: trees with the same names, shapes and dtypes.
      mask: bool `[*p]` for every leaf; where it is False the base is kept, whatever `tuned` has.

    Raises:
      StructureError: the trees do not fit.

    >>> diff({"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([1.0, 2.0, 4.0])})["w"].indices
    Array([2], dtype=int32)
    """
    tree.check_same(base, tuned, ("base", "tuned"))
    new = tree.flatten(tuned)
    keep = None
    if mask is not None:
        tree.check_same(base, mask, ("base", "mask"), dtypes=False)
        keep = tree.flatten(mask)
    patch: dict = {}
    for name, old in tree.flatten(base).items():
        changed = changed_bits(old, new[name])
        if keep is not None:
            changed &= np.asarray(keep[name], bool)
        where = np.flatnonzero(changed)
        if not where.size:
            continue
        item, dtype = np.dtype(old.dtype).itemsize, np.dtype(index_dtype(old.size))
        sparse = where.size * (item + dtype.itemsize) < old.size * item and old.size <= np.iinfo(dtype).max
        if sparse:
            values = np.asarray(new[name]).reshape(-1)[where]
            patch[name] = Sparse(jnp.asarray(where.astype(dtype)), jnp.asarray(values))
        else:
            patch[name] = Dense(jnp.where(changed, new[name], old))
    return patch


def changed_bits(old, new) -> np.ndarray:
    """Return bool `[*p]`: where two arrays of one dtype differ in any bit."""
    old, new = np.ascontiguousarray(old), np.ascontiguousarray(new)
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(old.dtype.itemsize)
    if bits is None:  # complex128
        return (
            (old.reshape(-1).view(np.uint64) != new.reshape(-1).view(np.uint64))
            .reshape(*old.shape, 2)
            .any(-1)
        )
    return old.view(bits) != new.view(bits)
