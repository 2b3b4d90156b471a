"""Structure: names, shapes, dtypes and indices fit the base, and no value is NaN or infinite."""

import numpy as np

from fishjax import tree
from fishjax.checkpoint._digest import leaf_specs
from fishjax.checkpoint._patch import _check_fit
from fishjax.errors import StructureError
from fishjax.vet._context import Context, Finding


def structure(context: Context) -> Finding:
    """Check that every entry fits the leaves it changes (4) and that its values are finite (1).

    Indices must be strictly increasing and in range; they are looked at on the host in int64, since a
    device drops or wraps bad ones silently. Nothing of the base is read but shapes and dtypes.
    """
    specs, changes = leaf_specs(context.base), context.changes
    _check_fit(changes, specs)
    if context.source is not None:
        for name, wanted in context.source.specs.items():
            if specs[name] != wanted:
                raise StructureError(
                    f"`{name}` is {tree.describe(specs[name])}; the patch is for {tree.describe(wanted)}"
                )
    bad = {f"{n}::{field}": x for n, c in changes.items() for field, x in c.arrays.items() if not _finite(x)}
    kinds = sorted({c.kind for c in changes.values()})
    counts = {name: int((~np.isfinite(x)).sum()) for name, x in bad.items()}
    details = {"entries": len(changes), "kinds": kinds, "not_finite": counts}
    if bad:
        first = next(iter(bad))
        text = f"`{first}` holds {counts[first]} NaN or infinite values"
        return Finding("structure", "fail", 1, text, details)
    text = f"{len(changes)} entries ({', '.join(kinds)}) fit; all values finite"
    return Finding("structure", "pass", 0, text, details)


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())
