"""The patch between two models on disk, tensor by tensor."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._digest import leaf_digest
from fishjax.checkpoint._kinds import Change, fold
from fishjax.checkpoint._lossy import MODES, shorten
from fishjax.checkpoint._params import open_params
from fishjax.checkpoint._patch import write_patch
from fishjax.checkpoint._safetensors import release
from fishjax.errors import UsageError
from fishjax.progress import track
from fishjax.tree import check_same
from fishjax.types import Digest


class Difference(NamedTuple):
    """What `diff_files` found and wrote."""

    digest: Digest  # the patch file's own SHA-256
    leaves: int  # tensors that differ
    changed: int  # entries that differ
    entries: int  # all entries of both models
    bytes: int  # of the patch file


def diff_files(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    *,
    metadata: Mapping[str, Any] | None = None,
    lossy: str | None = None,
) -> Difference:
    """Write the patch that turns `base` into `tuned`, bit for bit. Needs no jax.

    Bits are compared, so -0.0 differs from 0.0. Each changed tensor is stored sparse or dense,
    whichever is smaller. Memory stays within the patch and a few times the largest tensor.

    Args:
      base, tuned: .safetensors files or Hugging Face folders, with the same tensors.
      metadata, lossy: as for `save_patch`; a lossy patch is nearly what was asked for, and says how nearly.

    Raises:
      StructureError: the models differ in names, shapes or dtypes, or a new value is not finite.
      UsageError: `out` is one of the inputs; an unknown `lossy`.
    """
    for path in (base, tuned):
        if os.path.realpath(out) == os.path.realpath(path):
            raise UsageError(f"`{out}` is an input too; give the patch another name")
    changes: dict[str, Change] = {}
    base_digests: dict[str, Digest] = {}
    results: dict[str, Digest] = {}
    errors: dict[str, dict[str, float]] = {}
    count = 0
    if lossy not in (None, *MODES):
        raise UsageError(f"`lossy` must be one of {', '.join(map(repr, MODES))}, or None; got {lossy!r}")
    with open_params(base) as old, open_params(tuned) as new:
        specs = old.specs
        check_same(specs, new.specs, (f"`{base}`", f"`{tuned}`"))
        for name in track(sorted(specs), description="comparing"):
            before, after = old[name], new[name]
            base_digests[name] = leaf_digest(name, before)
            changed = _bits(before) != _bits(after)
            kept = int(np.count_nonzero(changed))
            if kept:
                changes[name], got = _change(changed, kept, after), after
                if lossy is not None:
                    short, lost = shorten(lossy, {name: changes[name]}, old.__getitem__)
                    changes |= short
                    errors |= lost["leaves"]
                    got = fold(name, changes[name], name, before)
                results[name] = leaf_digest(name, got)
                release(after)
            count += kept
        told = None if lossy is None else {"mode": lossy, "leaves": errors}
        digest = write_patch(out, changes, specs, base_digests, results, metadata, lossy=told)
    entries = sum(math.prod(spec.shape) for spec in specs.values())
    return Difference(digest, len(changes), count, entries, Path(out).stat().st_size)


def _change(changed: np.ndarray, kept: int, after: np.ndarray) -> Change:
    """Store new values sparsely if that is smaller; coded indices take log2(1/density) + 1.5 bits or so."""
    item = after.dtype.itemsize
    if kept * (item + (math.log2(changed.size / kept) + 1.5) / 8) >= changed.size * item:
        return Change("dense", {"values": after}, {})
    where = np.flatnonzero(changed)
    indices = where if changed.size > np.iinfo(np.int32).max else where.astype(np.int32)
    return Change("sparse", {"indices": indices, "values": after.reshape(-1)[where]}, {})


def _bits(array: np.ndarray) -> np.ndarray:
    """Return an array's entries, `[n]`, as unsigned integers of the same width."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")
