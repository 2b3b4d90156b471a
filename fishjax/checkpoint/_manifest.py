"""The files that fishjax writes: safetensors with a JSON manifest and a digest of the whole file."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._dtypes import Spec
from fishjax.checkpoint._header import SEAL, no_number, unique
from fishjax.checkpoint._safetensors import open_file, write_file
from fishjax.errors import FileFormatError, UsageError
from fishjax.types import Digest

KEY = "fishjax"  # the metadata key of the manifest
VERSION = 1


class Sealed(NamedTuple):
    """A verified file: its manifest, its arrays by name, and the SHA-256 that it carries."""

    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray]
    digest: Digest


def write_sealed(
    path: str | os.PathLike, format: str, manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Digest:
    """Write arrays and a manifest; return the SHA-256 that the file carries of itself.

    Raises:
      UsageError: the manifest holds something that JSON cannot.
    """
    try:
        text = json.dumps(
            {"format": format, "version": VERSION, **manifest},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
            ensure_ascii=False,
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"`metadata` must be JSON (objects, lists, strings, numbers): {error}") from None
    specs = {n: Spec(x.dtype, x.shape) for n, x in tensors.items()}
    digest = write_file(path, specs, tensors.__getitem__, {KEY: text}, seal=True)
    assert digest is not None
    return digest


def read_sealed(path: str | os.PathLike, format: str | None = None) -> Sealed:
    """Read a file of `write_sealed` after checking every byte of it.

    Args:
      format: "patch", "fisher" or "mask"; None takes any.

    Raises:
      FileFormatError: it is malformed, corrupt, of another format or of a later version.
    """
    with open_file(path, sealed=True) as file:
        manifest = read_manifest(path, file.metadata, format)
        return Sealed(manifest, file.read_all(), f"sha256:{file.metadata[SEAL]}")


def read_manifest(
    path: str | os.PathLike, metadata: Mapping[str, str], format: str | None = None
) -> dict[str, Any]:
    """Return the manifest in a file's metadata; see `read_sealed`, which also checks the file's bytes."""
    try:
        manifest = json.loads(metadata[KEY], object_pairs_hook=unique, parse_constant=no_number)
    except (KeyError, ValueError, RecursionError) as error:
        raise FileFormatError(f"`{path}` has no readable `{KEY}` manifest: {error}") from None
    if type(manifest) is not dict or manifest.get("version") != VERSION:
        got = manifest.get("version") if type(manifest) is dict else manifest
        raise FileFormatError(
            f"`{path}` has a manifest of version {str(got)[:40]}, this fishjax reads version {VERSION}"
        )
    if format is not None and manifest.get("format") != format:
        raise FileFormatError(
            f"`{path}` is a {str(manifest.get('format'))[:40]} file; wanted a {format} file"
        )
    return manifest


def is_sealed(metadata: Mapping[str, str]) -> bool:
    """Say whether a safetensors file's metadata is that of a file of `write_sealed`."""
    return KEY in metadata and SEAL in metadata


def take(path: object, table: Any, key: str, kind: type, where: str = "the manifest") -> Any:
    """Return `table[key]` of a manifest; a file without it, or with another type, is malformed."""
    value = table.get(key) if type(table) is dict else None
    if type(value) is not kind:
        raise FileFormatError(
            f"`{path}`: `{key}` of {where} must be of type {kind.__name__}; got {str(value)[:80]!r}"
        )
    return value


def take_shape(path: object, table: Any, where: str) -> tuple[int, ...]:
    """Return `table["shape"]`, a list of natural numbers."""
    shape = take(path, table, "shape", list, where)
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise FileFormatError(f"`{path}`: `shape` of {where} must be natural numbers; got {str(shape)[:80]}")
    return tuple(shape)
