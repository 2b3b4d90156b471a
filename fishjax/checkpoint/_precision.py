"""The precision that travels in a patch: its author's diagonal Fisher at the entries that it changes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fishjax.checkpoint._digest import flat_leaves
from fishjax.checkpoint._dtypes import NAMES, Spec, host
from fishjax.checkpoint._kinds import Change
from fishjax.errors import StructureError
from fishjax.types import Fisher

PRECISION = "precision"  # the field of a tensor's name
_DTYPES = ("BF16", "F16", "F32", "F64")


def precision_at(
    changes: Mapping[str, Change], specs: Mapping[str, Spec], precision: Fisher | None
) -> dict[str, np.ndarray]:
    """Return, for each leaf of a patch that has a precision, `[N]` at its entries or `[*p]` if it is dense.

    Raises:
      StructureError: a leaf that the patch does not change entry by entry; another shape; an entry that
        is negative, NaN or infinite.
    """
    found = {}
    given: Mapping[str, Any] = {} if precision is None else flat_leaves(precision)
    for name in given:
        if name not in changes:
            continue  # a Fisher of the whole model will do
        change = changes[name]
        if change.kind not in ("sparse", "dense", "delta"):
            raise StructureError(
                f"`{name}` is patched by kind `{change.kind}`, whose numbers have no diagonal precision; "
                "leave it out"
            )
        array, shape = host(f"{name}::{PRECISION}", given[name]), specs[name].shape
        indices = change.arrays.get("indices")
        if indices is not None and array.shape == shape and indices.shape != shape:
            array = array.reshape(-1)[indices.astype(np.int64)]
        wanted = shape if indices is None else indices.shape
        if array.shape != wanted:
            raise StructureError(
                f"the precision of `{name}` has shape {list(array.shape)}; wanted {list(wanted)}"
                + ("" if indices is None else f" or {list(shape)}")
            )
        if NAMES.get(array.dtype.newbyteorder("=")) not in _DTYPES:
            raise StructureError(f"the precision of `{name}` is {array.dtype}; wanted a float")
        with np.errstate(invalid="ignore"):  # signalling NaNs
            sound = (np.isfinite(array) & (array >= 0)).all()
        if not sound:
            raise StructureError(f"the precision of `{name}` must be finite and >= 0")
        found[name] = array
    if given and changes and not found:
        raise StructureError("`precision` has none of the leaves that the patch changes")
    return found
