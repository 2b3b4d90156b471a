"""A strict reader and a streaming writer of the safetensors format; every file comes through here.

Layout of a file: 8 bytes, the header's length (little-endian); the header, JSON; the tensors' bytes.
"""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.checkpoint._atomic import atomic_file, write_all
from fishjax.checkpoint._dtypes import Spec, byte_chunks, dtype_name, num_bytes
from fishjax.checkpoint._header import (
    MAX_TENSORS,
    MODEL_HEADER,
    PATCH_HEADER,
    SEAL,
    SEAL_KEY,
    Entry,
    bad_name,
    check_seal,
    parse_header,
)
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.types import Digest


class TensorFile(Mapping[str, np.ndarray]):
    """An open safetensors file: a mapping from names to read-only, memory-mapped arrays.

    Each array has a mapping of its own, made when it is asked for and gone with it: what is in memory
    is what is held. `specs` tells dtypes and shapes, `metadata` the file's own strings. Use it in a
    `with` statement; arrays outlive it.
    """

    def __init__(self, path: Path, fd: int, entries: dict[str, Entry], metadata: dict[str, str]):
        self.path, self.metadata = path, metadata
        self._fd, self._entries = fd, entries

    @property
    def specs(self) -> dict[str, Spec]:
        return {n: Spec(e.dtype, e.shape) for n, e in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.start == entry.stop:
            return np.empty(entry.shape, entry.dtype)
        first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._fd, entry.stop - first, access=mmap.ACCESS_READ, offset=first)
        return np.ndarray(entry.shape, entry.dtype, buffer=pages, offset=entry.start - first)

    def read_all(self) -> dict[str, np.ndarray]:
        """Return all arrays over one mapping of the whole file."""
        pages = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return {
            n: np.ndarray(e.shape, e.dtype, buffer=pages, offset=e.start if e.start < e.stop else 0)
            for n, e in self._entries.items()
        }

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor, in C order, as a fresh array `[stop - start]`."""
        entry = self._entries[name]
        begin = entry.start + start * entry.dtype.itemsize
        end = entry.start + stop * entry.dtype.itemsize
        if not entry.start <= begin <= end <= entry.stop:
            raise UsageError(f"`{name}` has no entries {start} to {stop}; its shape is {list(entry.shape)}")
        data = np.empty(stop - start, entry.dtype)
        view = memoryview(data.view(np.uint8))
        while view:
            count = os.preadv(self._fd, [view], begin)
            if not count:
                raise FileFormatError(f"`{self.path}` became shorter while `{name}` was read")
            view, begin = view[count:], begin + count
        return data

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the mixin's way would map the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def open_file(path: str | os.PathLike, *, sealed: bool = False) -> TensorFile:
    """Open a safetensors file after checking its header; nothing but the header is read.

    Args:
      path: a regular file.
      sealed: hold it to the rules of the files that fishjax writes (patch, mask, Fisher): no symbolic
        link, a header of at most 16 MiB, and the whole file's SHA-256 must be right.

    Raises:
      FileFormatError: it is malformed, corrupt or of another format.
      FileNotFoundError: there is no such file.
    """
    path = Path(path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe must not wait for a writer
    if sealed and path.is_symlink():
        raise FileFormatError(f"`{path}` is a symbolic link; give the file itself")
    fd = os.open(path, flags | (os.O_NOFOLLOW if sealed else 0))
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"`{path}` is no regular file")
        entries, metadata, header = parse_header(
            path, fd, found.st_size, PATCH_HEADER if sealed else MODEL_HEADER
        )
        if sealed:
            check_seal(path, fd, found.st_size, header, metadata)
        return TensorFile(path, fd, entries, metadata)
    except BaseException:
        os.close(fd)
        raise


def write_file(
    path: str | os.PathLike,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray | Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    *,
    seal: bool = False,
) -> Digest | None:
    """Write a safetensors file tensor by tensor, whole or not at all; equal input gives equal bytes.

    Args:
      specs: what each tensor is.
      read: gives a tensor by name, or pieces of it in C order; asked once for each, in the file's order.
      seal: put the SHA-256 of the whole file into the metadata; it is returned.

    Raises:
      StructureError: a dtype or name that the format cannot hold; or `read` gives something else
        than `specs` says.
      OSError: the file system refuses; what was at `path` is still there.

    >>> import tempfile
    >>> w = np.ones((2, 3), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_file(folder + "/a", {"w": Spec(w.dtype, w.shape)}, {"w": w}.get)
    ...     open_file(folder + "/a")["w"].sum()
    np.float32(6.0)
    """
    for name in specs:
        if reason := bad_name(name):
            raise StructureError(f"leaf name {name[:200]!r} {reason}; rename it")
    kinds = {n: dtype_name(n, s.dtype) for n, s in specs.items()}
    # Widest dtypes first, so that every tensor is aligned; the safetensors package does the same.
    order = sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n.encode()))
    head: dict[str, Any] = {}
    if metadata or seal:
        head["__metadata__"] = {**(metadata or {}), **({SEAL: "0" * 64} if seal else {})}
    offset = 0
    for name in order:
        size = num_bytes(*specs[name])
        head[name] = {
            "dtype": kinds[name],
            "shape": list(specs[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    limit = PATCH_HEADER if seal else MODEL_HEADER
    if len(text) > limit or len(order) > MAX_TENSORS:
        raise StructureError(
            f"{len(order)} tensors need a header of {len(text)} bytes; at most {limit} fit in a file"
        )
    whole = hashlib.sha256() if seal else None
    with atomic_file(path) as fd:

        def put(data: bytes | memoryview) -> None:
            if whole is not None:
                whole.update(data)
            write_all(fd, data)

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            got, spec = 0, specs[name]
            pieces = read(name)
            for piece in [pieces] if hasattr(pieces, "dtype") else pieces:
                piece = np.asarray(piece)
                if piece.dtype.newbyteorder("=") != spec.dtype.newbyteorder("="):
                    raise StructureError(f"`{name}` was announced as {spec.dtype} and came as {piece.dtype}")
                for data in byte_chunks(piece):
                    put(data)
                got += piece.nbytes
                release(piece)
            if got != num_bytes(*spec):
                raise StructureError(
                    f"`{name}` was announced with shape {list(spec.shape)} and came as {got} bytes"
                )
        if whole is None:
            return None
        os.lseek(fd, 8 + text.index(SEAL_KEY) + len(SEAL_KEY), os.SEEK_SET)
        write_all(fd, whole.hexdigest().encode())
    return f"sha256:{whole.hexdigest()}"


def release(array: np.ndarray) -> None:
    """Let go of a mapped array's pages; they are read again if they are needed again."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)
