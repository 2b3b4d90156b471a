"""Blocks of tensors in files: read into buffers that are used again, and widened.

`preadv` into one set of buffers a thread keeps the process small: mapped pages would count as its own.
"""

import math
import os
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import numpy as np

from fishjax.checkpoint._digest import Hasher
from fishjax.checkpoint._dtypes import Spec
from fishjax.errors import FileFormatError

HASHED = 1 << 20  # entries hashed at a time


class Readable(Protocol):
    """What can be read block by block: a tensor in a file, or one that a patch makes of it."""

    @property
    def spec(self) -> Spec: ...

    @property
    def size(self) -> int: ...

    def fill(self, data: np.ndarray, start: int) -> None:
        """Read entries from `start` on, as many as `data` `[n]` takes, which is of the same dtype."""

    def identity(self) -> list[Any]:
        """Return what changes with the entries, as JSON: a file's inode, size and time, and the place."""


class Tensor(NamedTuple):
    """A tensor in an open file."""

    path: str
    fd: int
    start: int  # the byte where it begins
    spec: Spec
    sealed: bool = False  # whether the file has a checksum of its own, as Fisher files have

    @property
    def size(self) -> int:
        return math.prod(self.spec.shape)

    def fill(self, data: np.ndarray, start: int) -> None:
        view = memoryview(data.view(np.uint8))
        offset = self.start + start * data.itemsize
        while view:
            count = os.preadv(self.fd, [view], offset)
            if not count:
                raise FileFormatError(f"`{self.path}` became shorter while it was read")
            view, offset = view[count:], offset + count

    def identity(self) -> list[Any]:
        found = os.fstat(self.fd)
        file = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
        return [*file, self.start, str(self.spec)]


class Buffers:
    """The memory of one thread: a buffer for every slot, as large as the largest block seen there."""

    def __init__(self) -> None:
        self._raw: dict[Hashable, np.ndarray] = {}

    def get(self, slot: Hashable, count: int, dtype: np.dtype) -> np.ndarray:
        """Return `count` entries of a slot's memory, with whatever was left there (zeros at first)."""
        size = count * dtype.itemsize
        if slot not in self._raw or self._raw[slot].size < size:
            self._raw[slot] = np.zeros(size, np.uint8)
        return self._raw[slot][:size].view(dtype)

    def read(self, slot: Hashable, tensor: Readable, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor as they are in the file."""
        data = self.get((slot, "raw"), stop - start, tensor.spec.dtype)
        tensor.fill(data, start)
        return data

    def read_wide(
        self, slot: Hashable, tensor: Readable, start: int, stop: int, dtype: np.dtype
    ) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor in a wider dtype."""
        data = self.read(slot, tensor, start, stop)
        if data.dtype == dtype:
            return data
        wide = self.get((slot, "wide"), data.size, dtype)
        np.copyto(wide, data)
        return wide


def hash_tensor(name: str, tensor: Tensor) -> str:
    """Return the content digest of a tensor in a file, read a piece at a time."""
    hasher, buffers = Hasher(name, tensor.spec.dtype, tensor.spec.shape), Buffers()
    for start in range(0, tensor.size, HASHED):
        hasher.update(buffers.read("hash", tensor, start, min(start + (HASHED), tensor.size)))
    return hasher.digest()
