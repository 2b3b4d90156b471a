"""Mask files: one bit an entry, or the coded positions of the kept ones where that is smaller."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax.checkpoint import _indices
from fishjax.checkpoint._digest import flat_leaves
from fishjax.checkpoint._manifest import read_sealed, take, take_shape, write_sealed
from fishjax.errors import FileFormatError, StructureError
from fishjax.tree import nest
from fishjax.types import Digest, Mask

_MAX_ENTRIES = 1 << 36


def save_mask(path: str | os.PathLike, mask: Mask, *, metadata: Mapping[str, Any] | None = None) -> Digest:
    """Write a mask file.

    Args:
      mask: a pytree of bools `[*p]`.
      metadata: how it was made, anything JSON can hold.

    Returns:
      The file's own SHA-256, which `load_mask` verifies.

    Raises:
      StructureError: a leaf is not of bools.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_mask(folder + "/m", {"w": np.array([True, False])})
    ...     load_mask(folder + "/m")
    ({'w': array([ True, False])}, {})
    """
    kept: dict[str, Any] = {}
    for name, leaf in flat_leaves(mask).items():
        array = np.asarray(leaf)
        if array.dtype != bool:
            raise StructureError(f"a mask must be of bools; `{name}` is {array.dtype}")
        kept[name] = array.shape, np.flatnonzero(array)
    return write_mask(path, kept, metadata=metadata)


def write_mask(
    path: str | os.PathLike,
    kept: Mapping[str, tuple[tuple[int, ...], Sequence[int] | np.ndarray]],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Digest:
    """Write a mask file from what it keeps, without ever making the mask; see `save_mask`.

    Args:
      kept: of every leaf, its shape and strictly increasing flat positions `[N]`, as of `masks.indices`.
      metadata: how it was made, anything JSON can hold.
    """
    notes, tensors = {}, {}
    for name, (shape, positions) in kept.items():
        size, where = math.prod(shape), np.asarray(positions, np.int64)
        note: dict[str, Any] = {"encoding": "bits"}
        if 2 * where.size < size:  # beyond that no code of positions is smaller than bits
            note, stored = _indices.encode(where)
        if note["encoding"] == "bits" or stored.nbytes >= (size + 7) // 8:
            bits = np.zeros((size + 7) // 8 * 8, bool)
            bits[where] = True
            note, stored = {"encoding": "bits"}, np.packbits(bits)
        notes[name], tensors[name] = {"shape": list(shape), **note}, stored
    return write_sealed(path, "mask", {"leaves": notes, "metadata": dict(metadata or {})}, tensors)


def load_mask(path: str | os.PathLike) -> tuple[Mask, dict[str, Any]]:
    """Read a mask file; return the mask, a nested dict of bool arrays, and its metadata.

    Raises:
      FileFormatError: the file is malformed or corrupt.
    """
    manifest, tensors, _ = read_sealed(path, "mask")
    notes = take(path, manifest, "leaves", dict)
    if odd := sorted(set(notes) ^ set(tensors)):
        raise FileFormatError(
            f"`{path}` contradicts itself: its manifest and its tensors differ on `{odd[0]}`"
        )
    try:
        mask = {name: _decode(path, name, note, tensors[name]) for name, note in notes.items()}
    except ValueError as error:
        raise FileFormatError(
            str(error) if isinstance(error, FileFormatError) else f"`{path}`: {error}"
        ) from None
    return nest(mask), take(path, manifest, "metadata", dict)


def _decode(path: object, name: str, note: Any, stored: np.ndarray) -> np.ndarray:
    shape, encoding = take_shape(path, note, f"`{name}`"), take(path, note, "encoding", str, f"`{name}`")
    size = math.prod(shape)
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise ValueError(
            f"mask leaf `{name}` is stored as {stored.dtype}{list(stored.shape)}, wanted uint8[n]"
        )
    if encoding == "bits":
        if stored.size != (size + 7) // 8:
            raise ValueError(f"mask leaf `{name}` has {stored.size} bytes for {size} bits")
        bits = np.unpackbits(stored)
        if bits[size:].any():
            raise ValueError(f"mask leaf `{name}` has bits beyond its {size} entries")
        return bits[:size].astype(bool).reshape(shape)
    if size > _MAX_ENTRIES:  # a few bytes must not make gigabytes of zeros
        raise ValueError(f"mask leaf `{name}` has {size} entries; at most {_MAX_ENTRIES} are allowed")
    where = _indices.decode(path, note, stored, f"the entries that mask leaf `{name}` keeps")
    if where.size and where[-1] >= size:
        raise ValueError(f"mask leaf `{name}` keeps entry {where[-1]} of {size}")
    array = np.zeros(size, bool)
    array[where] = True
    return array.reshape(shape)
