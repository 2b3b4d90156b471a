"""Patch files as inputs of a merge: what they change is folded as it is read, the rest is the base's."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.checkpoint import _kinds, read_patch
from fishjax.checkpoint._dtypes import Spec
from fishjax.checkpoint._header import SEAL
from fishjax.checkpoint._manifest import is_sealed, read_manifest, take
from fishjax.checkpoint._patch import PatchFile, touched_specs
from fishjax.checkpoint._safetensors import open_file
from fishjax.errors import WrongBaseError
from fishjax.merge._blocks import Tensor, hash_tensor
from fishjax.types import Digest

HELD = 4  # entries of a patch whose positions are held: each thread of the engine is in one leaf


class PatchSource:
    """A patch file: opened, it is a header; `file` reads it and checks every byte."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open_file(path) as file:
            manifest = read_manifest(path, file.metadata, "patch")
            self.digest: Digest = f"sha256:{file.metadata[SEAL]}"
        self.specs = touched_specs(path, manifest)
        self.bytes = os.stat(path).st_size
        entries = take(path, manifest, "changes", dict).values()
        notes = [take(path, e, "indices", dict) for e in entries if type(e) is dict and "indices" in e]
        # Values stay in the file, mapped; positions are packed there, and integers when they are used.
        self.memory = self.bytes + 8 * sum(sorted(take(path, n, "count", int) for n in notes)[-HELD:])
        self.entry = functools.lru_cache(HELD)(self._entry)

    @functools.cached_property
    def file(self) -> PatchFile:
        return read_patch(self.path, lazy=True)

    @functools.cached_property
    def owners(self) -> dict[str, str]:
        """Which entry changes a leaf."""
        return {t: n for n, change in self.file.changes.items() for t in _kinds.touched(n, change)}

    def _entry(self, name: str) -> _kinds.Change:
        change = self.file.changes[name]
        return change._replace(arrays=dict(change.arrays))


class Patched(NamedTuple):
    """A tensor of the base as a patch makes it; reading some of it folds the rows around."""

    name: str
    base: Tensor
    patch: PatchSource

    @property
    def spec(self) -> Spec:
        return self.base.spec

    @property
    def size(self) -> int:
        return self.base.size

    def fill(self, data: np.ndarray, start: int) -> None:
        owner = self.patch.owners[self.name]
        change = self.patch.entry(owner)
        shape, skipped = self.spec.shape, 0
        if data.size < self.size:
            width = shape[-1] if len(shape) > 1 else 1
            first, last = start // width, -(-(start + data.size) // width)
            change = _kinds.rows(owner, change, self.name, shape, first, last)
            owner, shape, skipped = self.name, (last - first, *shape[1:][-1:]), start % width
        weight = np.zeros(shape, data.dtype)
        mine = slice(skipped, skipped + data.size)
        self.base.fill(weight.reshape(-1)[mine], start)
        data[:] = _kinds.fold(owner, change, self.name, weight).reshape(-1)[mine]

    def identity(self) -> list[Any]:
        return [self.name, self.patch.digest, *self.base.identity()]


def is_patch(path: str | os.PathLike) -> bool:
    """Say whether a path is a patch file."""
    if os.path.isdir(path) or os.fspath(path).endswith((".yaml", ".yml")):
        return False
    with open_file(path) as file:
        return is_sealed(file.metadata) and read_manifest(path, file.metadata).get("format") == "patch"


def open_patch(path: str | os.PathLike, base: Mapping[str, Tensor]) -> dict[str, Patched]:
    """Return the tensors of a base that a patch changes, as it makes them; reads the header only.

    Raises:
      WrongBaseError: the patch is for a base with other leaves.
    """
    patch = PatchSource(path)
    for name, spec in patch.specs.items():
        if name not in base or base[name].spec != spec:
            got = tree.describe(base[name].spec) if name in base else "missing"
            raise WrongBaseError(
                f"`{path}` is for another base: `{name}` is {got}, wanted {tree.describe(spec)}"
            )
    return {name: Patched(name, base[name], patch) for name in patch.specs}


def check_patches(tensors: Sequence[Patched], run: Callable[..., Iterator[Any]]) -> None:
    """Read patches, and check that each is for the base it is read with; `run` maps over threads.

    Raises:
      FileFormatError: a patch is corrupt.
      WrongBaseError: a patch is for another base.
    """
    for _ in run(lambda patch: patch.owners, list(dict.fromkeys(t.patch for t in tensors))):
        pass
    leaves = list(dict.fromkeys((t.name, t.base) for t in tensors))  # each is hashed once
    digests = dict(zip(leaves, run(lambda leaf: hash_tensor(*leaf), leaves), strict=True))
    for t in tensors:
        if digests[t.name, t.base] != t.patch.file.base_digests[t.name]:
            raise WrongBaseError(_other_base(t.patch.path, t.name))


def _other_base(path: str | os.PathLike, name: str) -> str:
    return f"`{path}` is for another base: `{name}` is missing or has other values"
