"""Increasing positions as bytes: Rice's code or packed gaps, whichever is smaller; a note says which."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fishjax.checkpoint import _gaps, _rice
from fishjax.checkpoint._dtypes import DTYPES
from fishjax.checkpoint._manifest import take
from fishjax.errors import FileFormatError


class Decoded(Mapping[str, np.ndarray]):
    """Arrays of which `indices` is decoded anew whenever it is asked for, so that nobody holds it."""

    def __init__(self, arrays: Mapping[str, np.ndarray], indices: Callable[[], np.ndarray]):
        self._arrays, self._indices = arrays, indices

    def __getitem__(self, name: str) -> np.ndarray:
        return self._indices() if name == "indices" else self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def encode(positions: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Return a note for the manifest, and the stream, uint8, of strictly increasing positions `[N]`.

    >>> note, stream = encode(np.array([3, 200, 201, 900]))
    >>> note, decode("a file", note, stream, "the positions")
    ({'encoding': 'rice', 'parameter': 7, 'count': 4}, array([  3, 200, 201, 900]))
    """
    parameter, rice = _rice.encode(positions)
    gaps = _gaps.encode(positions)
    if gaps is not None and gaps.nbytes < rice.nbytes:
        return {"encoding": "gaps", "count": positions.size}, gaps
    return {"encoding": "rice", "parameter": parameter, "count": positions.size}, rice


def decode(path: object, note: dict[str, Any], stored: np.ndarray, where: str) -> np.ndarray:
    """Return the positions, int64 `[N]`, that a note and its stream stand for.

    Args:
      path: the file, for messages.
      where: what to call the positions in a message.

    Raises:
      ValueError: the note or the stream is malformed.
    """
    encoding = take(path, note, "encoding", str, where)
    if encoding not in ("rice", "gaps"):
        raise ValueError(f"{where} have the unknown encoding {encoding[:20]!r}")
    count = take(path, note, "count", int, where)
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise ValueError(f"{where} are stored as {stored.dtype}{list(stored.shape)}, wanted uint8[n]")
    if encoding == "rice":
        return _rice.decode(stored, take(path, note, "parameter", int, where), count)
    return _gaps.decode(stored, count)


def encode_within(indices: np.ndarray, size: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the manifest's note and the stored array of strictly increasing indices below `size`."""
    width = next(d for d in (np.uint8, np.uint16, np.uint32, np.uint64) if size <= np.iinfo(d).max + 1)
    wide = indices.dtype.itemsize == 8 or size > np.iinfo(np.int32).max
    dtype = {"dtype": "I64" if wide else "I32"}
    note, stream = encode(indices)
    if stream.nbytes < indices.size * np.dtype(width).itemsize:
        return note | dtype, stream
    return {"encoding": "raw", "count": indices.size} | dtype, indices.astype(width)


def decode_paired(
    path: object, name: str, note: dict[str, Any], stored: np.ndarray, paired: int
) -> np.ndarray:
    """Return a leaf's indices in their own dtype, as many as are `paired` with values; unchecked by its size.

    Raises:
      FileFormatError: they are not what their note says.
    """
    where = f"the indices of `{name}`"
    count, dtype = take(path, note, "count", int, where), take(path, note, "dtype", str, where)
    if dtype not in ("I32", "I64") or stored.ndim != 1 or stored.dtype.kind != "u":
        raise FileFormatError(f"`{path}`: {where} are stored as {stored.dtype}, to be {dtype[:20]}")
    if count != paired:  # before anything is unpacked: what is in the file bounds what is made of it
        raise FileFormatError(f"`{path}`: {where} are malformed: {count} do not pair with {paired} values")
    if note.get("encoding") == "raw":
        indices = stored
    else:
        try:
            indices = decode(path, note, stored, where)
        except FileFormatError:
            raise
        except ValueError as error:
            raise FileFormatError(f"`{path}`: {where} are malformed: {error}") from None
    if indices.size != count or (count and int(indices.max()) > np.iinfo(DTYPES[dtype]).max):
        raise FileFormatError(f"`{path}`: {where} are not {count} of dtype {dtype}")
    return indices.astype(DTYPES[dtype])
