"""Fisher files: a diagonal that others can use without the data it came from."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fishjax.checkpoint._digest import flat_leaves
from fishjax.checkpoint._dtypes import NAMES, host
from fishjax.checkpoint._manifest import read_sealed, take, write_sealed
from fishjax.errors import FileFormatError, StructureError
from fishjax.tree import nest
from fishjax.types import Digest, Fisher

_DTYPES = ("BF16", "F32", "F64")
_CHUNK = 1 << 18  # entries checked at a time


def save_fisher(path: str | os.PathLike, fisher: Fisher, *, metadata: Mapping[str, Any]) -> Digest:
    """Write a Fisher file.

    Args:
      fisher: a pytree of bfloat16, float32 or float64 `[*p]`, finite and >= 0.
      metadata: its recipe, anything JSON can hold: estimator, number of examples, seed, data id,
        base id.

    Returns:
      The file's own SHA-256, which `load_fisher` verifies.

    Raises:
      StructureError: an entry is negative, NaN or infinite, or of another dtype.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_fisher(folder + "/f", {"w": np.ones(2)}, metadata={"examples": 8})
    ...     load_fisher(folder + "/f")
    ({'w': array([1., 1.])}, {'examples': 8})
    """
    flat = {n: host(n, x) for n, x in flat_leaves(fisher).items()}
    for name, array in flat.items():
        if reason := _problem(array):
            raise StructureError(f"Fisher leaf `{name}` {reason}")
    return write_sealed(path, "fisher", {"metadata": dict(metadata)}, flat)


def load_fisher(path: str | os.PathLike) -> tuple[Fisher, dict[str, Any]]:
    """Read a Fisher file; return the Fisher, a nested dict, and its recipe.

    Raises:
      FileFormatError: the file is malformed or corrupt, or holds what no Fisher can.
    """
    manifest, flat, _ = read_sealed(path, "fisher")
    for name, array in flat.items():
        if reason := _problem(array):
            raise FileFormatError(f"`{path}`: leaf `{name}` {reason}")
    return nest(flat), take(path, manifest, "metadata", dict)


def _problem(array: np.ndarray) -> str | None:
    if NAMES.get(array.dtype.newbyteorder("=")) not in _DTYPES:
        return f"is {array.dtype}; wanted bfloat16, float32 or float64"
    flat, most = array.reshape(-1), array.dtype.type(np.inf)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            if not ((part >= 0) & (part < most)).all():
                return "holds an entry that is negative, NaN or infinite"
    return None
