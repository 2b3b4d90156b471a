"""A strict reader and a streaming writer of the safetensors format; every file comes through here.

Layout of a file: 8 bytes, the header's length (little-endian); the header, JSON; the tensors' bytes.
A file is hostile until its header is parsed: every length is checked before it is used, and what the
format leaves open (duplicate keys, holes, odd names, unknown fields) is refused.
"""

import hashlib
import json
import mmap
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._atomic import atomic_file, write_all
from fishjax.checkpoint._dtypes import DTYPES, Spec, byte_chunks, dtype_name, num_bytes
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.types import Digest

MODEL_HEADER = 100_000_000  # bytes; what the format itself allows
PATCH_HEADER = 16 << 20
MAX_TENSORS = 1_000_000
SEAL = "fishjax.sha256"  # metadata key: SHA-256 of the whole file with these 64 characters zeroed
_SEAL_KEY = f'"{SEAL}":"'.encode()
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_RANK = 64
_OTHER_FORMATS = [
    (0, b"PK\x03\x04", "a zip archive (torch `.pt`/`.bin`, npz or keras)"),
    (0, b"\x93NUMPY", "a numpy file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (257, b"ustar", "a tar archive"),
    *((0, bytes([0x80, protocol]), "a pickle") for protocol in range(6)),
    *((0, bytes([first]), "a msgpack file") for first in [*range(0x80, 0x90), 0xDE, 0xDF]),
]


class Entry(NamedTuple):
    """A tensor's place in a file: bytes `start` to `stop` from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


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
        entries, metadata, header = _parse_header(
            path, fd, found.st_size, PATCH_HEADER if sealed else MODEL_HEADER
        )
        if sealed:
            _check_seal(path, fd, found.st_size, header, metadata)
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
        os.lseek(fd, 8 + text.index(_SEAL_KEY) + len(_SEAL_KEY), os.SEEK_SET)
        write_all(fd, whole.hexdigest().encode())
    return f"sha256:{whole.hexdigest()}"


def release(array: np.ndarray) -> None:
    """Let go of a mapped array's pages; they are read again if they are needed again."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def bad_name(name: str) -> str | None:
    """Say what is wrong with a tensor's name, or return None.

    >>> bad_name("encoder.weight"), bad_name("../../etc/passwd")
    (None, 'has an empty or `..` part')
    """
    if not all(part not in ("", "..") for dotted in name.split(".") for part in dotted.split("/")):
        return "has an empty or `..` part"
    if any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in name):
        return "holds a control character"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's NFC form"
    return None


def _parse_header(
    path: Path, fd: int, size: int, limit: int
) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    start = os.pread(fd, 512, 0)
    length = int.from_bytes(start[:8], "little")
    whole = 2 <= length <= size - 8
    if not whole or start[8:9] != b"{":
        for offset, magic, what in _OTHER_FORMATS:
            if start[offset : offset + len(magic)] == magic and not (whole and start[8:9].isspace()):
                raise FileFormatError(
                    f"`{path}` is {what}, not a safetensors file; it was read no further, since such a file "
                    "can run code or cannot be checked. Convert it to safetensors where you trust it"
                )
        what = (
            "the header does not begin with `{`"
            if whole
            else f"{size} bytes have no room for a header of {length}"
        )
        raise FileFormatError(f"`{path}` is no safetensors file: {what}")
    if length > limit:
        raise FileFormatError(f"`{path}` has a header of {length} bytes; at most {limit} are allowed")
    raw = _read_exactly(path, fd, 8, length)
    try:
        head = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise FileFormatError(f"`{path}` has a header that is nested too deep") from None
    except ValueError as error:  # bad UTF-8 or JSON, or one of the hooks
        raise FileFormatError(f"`{path}` has a malformed header: {error}") from None
    metadata = head.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise FileFormatError(f"`{path}` has `__metadata__` that is not an object of strings")
    if any("\ud800" <= c <= "\udfff" for text in [*metadata, *metadata.values()] for c in text):
        raise FileFormatError(f"`{path}` has `__metadata__` with half a surrogate pair")
    if len(head) > MAX_TENSORS:
        raise FileFormatError(f"`{path}` has {len(head)} tensors; at most {MAX_TENSORS} are allowed")
    entries = {name: _entry(path, name, info, 8 + length) for name, info in head.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps the one before" if entry.start < end else "leaves a hole before it"
            raise FileFormatError(f"`{path}`: tensor `{name}` {what} (begins at {entry.start}, wanted {end})")
        end = entry.stop
    if end != size:
        raise FileFormatError(
            f"`{path}` has {size} bytes and its tensors end at {end}; it is cut short or has a tail"
        )
    return entries, metadata, raw


def _entry(path: Path, name: str, info: Any, origin: int) -> Entry:
    def fail(reason: str) -> FileFormatError:
        return FileFormatError(f"`{path}`: tensor {name[:200]!r} {reason}")

    if reason := bad_name(name):
        raise fail(reason)
    if type(info) is not dict or set(info) != _FIELDS:
        raise fail(f"must have exactly the fields {sorted(_FIELDS)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise fail(f"has dtype {str(dtype)[:40]!r}, which is not one of {', '.join(DTYPES)}")
    if not all(type(x) is list and all(type(i) is int for i in x) for x in (shape, offsets)):
        raise fail("needs lists of integers for `shape` and `data_offsets`")
    if len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > _MAX_RANK:
        raise fail(f"needs two ordered `data_offsets` and at most {_MAX_RANK} axes")
    extent = DTYPES[dtype].itemsize
    for n in shape:
        extent *= max(n, 1)
        if extent >= 1 << 63:  # also where another axis is 0: numpy cannot hold such a shape
            raise fail("has a shape beyond 2^63 bytes")
    size = num_bytes(DTYPES[dtype], tuple(shape))
    if size != offsets[1] - offsets[0]:
        raise fail(f"is {dtype}{shape}, {size} bytes, and spans {offsets[1] - offsets[0]}")
    return Entry(DTYPES[dtype], tuple(shape), origin + offsets[0], origin + offsets[1])


def _check_seal(path: Path, fd: int, size: int, header: bytes, metadata: Mapping[str, str]) -> None:
    at = header.find(_SEAL_KEY) + len(_SEAL_KEY)
    seal = metadata.get(SEAL)
    if (
        seal is None
        or len(seal) != 64
        or header[at : at + 64] != seal.encode()
        or header.count(_SEAL_KEY) != 1
    ):
        raise FileFormatError(
            f"`{path}` has no whole-file digest `{SEAL}`; fishjax writes it into each of its files"
        )
    whole = hashlib.sha256(len(header).to_bytes(8, "little"))
    whole.update(header[:at] + b"0" * 64 + header[at + 64 :])
    for start in range(8 + len(header), size, 1 << 24):
        whole.update(_read_exactly(path, fd, start, min(1 << 24, size - start)))
    if whole.hexdigest() != seal:
        raise FileFormatError(
            f"`{path}` is corrupt: its SHA-256 is {whole.hexdigest()[:16]}, it says {seal[:16]}; get it again"
        )


def _read_exactly(path: Path, fd: int, start: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.pread(fd, count, start)
        if not part:
            raise FileFormatError(f"`{path}` became shorter while it was read")
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return b"".join(parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:200]!r} is there twice")
    return found


def _natural(text: str) -> int:
    if text[0] == "-" or len(text) > 20:
        raise ValueError(f"number {text[:24]} is not a natural number below 2^64")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"number {text[:24]} is not an integer")
