"""Blocks of tensors in files: read into buffers that are used again, and widened.

`preadv` into one set of buffers a thread keeps the process small: mapped pages would count as its own.
"""

import os
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from fishjax.checkpoint._dtypes import Spec
from fishjax.errors import FileFormatError


class Tensor(NamedTuple):
    """A tensor in an open file."""

    path: str
    fd: int
    start: int  # the byte where it begins
    spec: Spec
    sealed: bool = False  # whether the file has a checksum of its own, as Fisher files have

    @property
    def size(self) -> int:
        return int(np.prod(self.spec.shape, dtype=np.int64))


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

    def read(self, slot: Hashable, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor as they are in the file."""
        data = self.get((slot, "raw"), stop - start, tensor.spec.dtype)
        view = memoryview(data.view(np.uint8))
        offset = tensor.start + start * data.itemsize
        while view:
            count = os.preadv(tensor.fd, [view], offset)
            if not count:
                raise FileFormatError(f"`{tensor.path}` became shorter while it was read")
            view, offset = view[count:], offset + count
        return data

    def read_wide(self, slot: Hashable, tensor: Tensor, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor in a wider dtype."""
        data = self.read(slot, tensor, start, stop)
        if data.dtype == dtype:
            return data
        wide = self.get((slot, "wide"), data.size, dtype)
        np.copyto(wide, data)
        return wide
