"""The header of a safetensors file, taken apart and checked before anything else is read.

A file is hostile until its header is parsed: every length is checked before it is used, and what the
format leaves open (duplicate keys, holes, odd names, unknown fields) is refused.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._dtypes import DTYPES, num_bytes
from fishjax.errors import FileFormatError

MODEL_HEADER = 100_000_000  # bytes; what the format itself allows
PATCH_HEADER = 16 << 20
MAX_TENSORS = 1_000_000
SEAL = "fishjax.sha256"  # metadata key: SHA-256 of the whole file with these 64 characters zeroed
SEAL_KEY = f'"{SEAL}":"'.encode()
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_RANK = 64
_CONTROL = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # control, direction marks, surrogates, line breaks
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


def parse_header(
    path: Path, fd: int, size: int, limit: int
) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """Return entries by name, metadata, and the header's own bytes, of an open file of `size` bytes."""
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
            object_pairs_hook=unique,
            parse_int=_natural,
            parse_float=no_number,
            parse_constant=no_number,
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


def check_seal(path: Path, fd: int, size: int, header: bytes, metadata: Mapping[str, str]) -> None:
    """Raise unless the file's SHA-256 is the one that its metadata says."""
    at = header.find(SEAL_KEY) + len(SEAL_KEY)
    seal = metadata.get(SEAL)
    if (
        seal is None
        or len(seal) != 64
        or header[at : at + 64] != seal.encode()
        or header.count(SEAL_KEY) != 1
    ):
        raise FileFormatError(
            f"`{path}` has no whole-file digest `{SEAL}`; fishjax writes it into each of its files"
        )
    whole = hashlib.sha256(len(header).to_bytes(8, "little"))
    whole.update(header[:at] + b"0" * 64 + header[at + 64 :])
    start, buffer = 8 + len(header), memoryview(bytearray(1 << 20))  # one that stays in the cache
    while start < size:
        count = os.preadv(fd, [buffer[: size - start]], start)
        if not count:
            raise FileFormatError(f"`{path}` became shorter while it was read")
        whole.update(buffer[:count])
        start += count
    if whole.hexdigest() != seal:
        raise FileFormatError(
            f"`{path}` is corrupt: its SHA-256 is {whole.hexdigest()[:16]}, it says {seal[:16]}; get it again"
        )


def bad_name(name: str) -> str | None:
    """Say what is wrong with a tensor's name, or return None.

    >>> bad_name("encoder.weight"), bad_name("../../etc/passwd")
    (None, 'has an empty or `..` part')
    """
    if not all(part not in ("", "..") for dotted in name.split(".") for part in dotted.split("/")):
        return "has an empty or `..` part"
    if any(unicodedata.category(c) in _CONTROL for c in name):
        return "holds a control character"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's NFC form"
    return None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, for `object_pairs_hook`; a key that is there twice is an error."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:200]!r} is there twice")
    return found


def no_number(text: str) -> None:
    """Refuse NaN, infinity and fractions, for `parse_constant` and `parse_float`."""
    raise ValueError(f"number {text[:24]} is not an integer")


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


def _read_exactly(path: Path, fd: int, start: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.pread(fd, count, start)
        if not part:
            raise FileFormatError(f"`{path}` became shorter while it was read")
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return b"".join(parts)


def _natural(text: str) -> int:
    if text[0] == "-" or len(text) > 20:
        raise ValueError(f"number {text[:24]} is not a natural number below 2^64")
    return int(text)
