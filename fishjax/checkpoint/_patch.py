"""Patch files: what changes, for which base, and what comes out, each with its digest.

Tensors are named `<leaf>::<field>` after the fields of the patch's kinds, and `<leaf>::precision`. Indices
are coded by `_indices`. The manifest has the base's content id, dtype, shape and digest of every leaf that
is touched, the digest of every result that is exact, each entry's kind and static fields, what a lossy
patch lost, and the author's metadata.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint import _indices, _kinds
from fishjax.checkpoint._digest import flat_leaves, leaf_digest, leaf_specs, root
from fishjax.checkpoint._dtypes import DTYPES, Spec, dtype_name, host
from fishjax.checkpoint._kinds import Change
from fishjax.checkpoint._lossy import shorten
from fishjax.checkpoint._manifest import read_sealed, take, take_shape, write_sealed
from fishjax.checkpoint._precision import PRECISION, precision_at
from fishjax.checkpoint._safetensors import release
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.types import Digest, Fisher, Params, Patch


class PatchFile(NamedTuple):
    """A patch as it is in a file, every byte checked."""

    changes: dict[str, Change]  # by leaf
    specs: dict[str, Spec]  # of each base leaf that is touched
    base_id: Digest  # the content id of the whole base
    base_digests: dict[str, Digest]  # of each base leaf that is touched
    result_digests: dict[str, Digest]  # of each patched leaf whose result is exact
    metadata: dict[str, Any]  # what the author says: recipe, author, licence, parents, requires ...
    digest: Digest  # the SHA-256 that the file carries of itself
    precision: dict[str, np.ndarray]  # by leaf, as of `load_precision`
    lossy: dict[str, Any] | None  # how values were shortened, and by how much they differ; None: exact


def save_patch(
    path: str | os.PathLike,
    patch: Patch,
    *,
    base: Params,
    metadata: Mapping[str, Any] | None = None,
    precision: Fisher | None = None,
    lossy: str | None = None,
) -> Digest:
    """Write a patch file; values are stored in the dtype of the leaf that they replace.

    So what a bfloat16 leaf was trained to in float32 is rounded once, as `patches.apply` rounds it.

    Args:
      patch: `{leaf name: kind}`.
      base: the params that it is for, or what `open_params` gives.
      metadata: anything JSON can hold; by custom `recipe` (method, density, estimator, seed, data
        id), `author`, `licence`, `parents`, `requires`.
      precision: the contributor's diagonal Fisher, to travel with the patch (`merge.information`): a
        tree with `[*p]` for every leaf of the patch, or `[N]` at the entries of a sparse one.
      lossy: "bf16" halves the values of wider leaves; "int8" stores changes of the base in one byte,
        with a power of two for each 64. The file states the error, and promises the lossy result.

    Returns:
      The file's own SHA-256, which `load_patch` verifies.

    Raises:
      StructureError: the patch does not fit the base, or holds NaN or infinity; so does the precision.
      UsageError: `metadata` is not JSON; an unknown `lossy`.
      OSError: the file system refuses; what was at `path` is still there.

    >>> import tempfile
    >>> from fishjax.patches import Sparse
    >>> base = {"w": np.zeros(4)}
    >>> patch = {"w": Sparse(np.array([1, 3]), np.array([0.5, 2]))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_patch(folder + "/p", patch, base=base, metadata={"author": "ada"})
    ...     load_patch(folder + "/p")
    ({'w': Sparse(indices=array([1, 3]), values=array([0.5, 2. ]))}, {'author': 'ada'})
    """
    from fishjax.patches import KINDS

    known = {cls: kind for kind, cls in KINDS.items()}
    specs, leaves = leaf_specs(base), flat_leaves(base)
    changes: dict[str, Change] = {}
    for name, value in patch.items():
        if type(value) not in known:
            raise UsageError(
                f"`{name}` is patched by {type(value).__name__}; wanted one of {', '.join(KINDS)}"
            )
        arrays, static = {}, {}
        for field in dataclasses.fields(value):
            got = getattr(value, field.name)
            if field.metadata.get("static"):
                static[field.name] = got.item() if isinstance(got, np.generic) else got
            elif got is not None:
                arrays[field.name] = host(f"{name}::{field.name}", got)
        changes[name] = Change(known[type(value)], arrays, static)
    _check_fit(changes, specs)
    for name, change in changes.items():
        if "values" in change.arrays:
            values = change.arrays["values"].astype(specs[name].dtype, copy=False)
            changes[name] = change._replace(arrays={**change.arrays, "values": values})
    known_at = precision_at(changes, specs, precision)
    lost = None
    if lossy is not None:
        changes, lost = shorten(lossy, changes, lambda name: host(name, leaves[name]))
    digests = {n: leaf_digest(n, leaves[n]) for n in specs}
    results = {}
    for name, change in changes.items():
        if change.kind in _kinds.EXACT:
            for target in _kinds.touched(name, change):
                new = _kinds.fold(name, change, target, host(target, leaves[target]))
                results[target] = leaf_digest(target, new)
    return write_patch(path, changes, specs, digests, results, metadata, precision=known_at, lossy=lost)


def write_patch(
    path: str | os.PathLike,
    changes: Mapping[str, Change],
    specs: Mapping[str, Spec],
    base_digests: Mapping[str, Digest],
    result_digests: Mapping[str, Digest],
    metadata: Mapping[str, Any] | None = None,
    *,
    precision: Mapping[str, np.ndarray] | None = None,
    lossy: Mapping[str, Any] | None = None,
) -> Digest:
    """Write a patch file from its parts; needs no jax.

    Args:
      specs, base_digests: of every leaf of the base.
      result_digests: of the patched leaves whose kind is exact.

    Raises:
      StructureError: a value is NaN or infinite.
    """
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    for name, change in sorted(changes.items()):
        entries[name] = {"kind": change.kind, "static": change.static}
        for field, array in change.arrays.items():
            if not _finite(array):
                raise StructureError(f"`{name}::{field}` holds NaN or infinity; a patch must be finite")
            release(array)
            if field == "indices":
                entries[name]["indices"], array = _indices.encode_within(array, math.prod(specs[name].shape))
            tensors[f"{name}::{field}"] = array
    tensors |= {f"{name}::{PRECISION}": array for name, array in (precision or {}).items()}
    touched = sorted({t for n, c in changes.items() for t in _kinds.touched(n, c)})
    manifest = {
        "base": root(base_digests),
        "touched": {
            n: {
                "dtype": dtype_name(n, specs[n].dtype),
                "shape": list(specs[n].shape),
                "digest": base_digests[n],
            }
            for n in touched
        },
        "results": dict(result_digests),
        "changes": entries,
        "metadata": dict(metadata or {}),
    } | ({"lossy": lossy} if lossy else {})
    return write_sealed(path, "patch", manifest, tensors)


def load_patch(path: str | os.PathLike, *, check_finite: bool = True) -> tuple[Patch, dict[str, Any]]:
    """Read a patch file; return the patch and its author's metadata.

    Every byte is checked against the file's digest; indices are checked before any device sees them.

    Args:
      check_finite: refuse NaN and infinity; `vet` takes such a file in order to report it.

    Raises:
      FileFormatError: the file is malformed, corrupt, or of a kind that this fishjax does not know.
      FileNotFoundError: there is no such file.
    """
    from fishjax.patches import KINDS

    file = read_patch(path, check_finite=check_finite)
    patch = {}
    for name, change in file.changes.items():
        if change.kind not in KINDS:
            raise FileFormatError(
                f"`{path}` patches `{name}` by kind `{change.kind}`; known: {', '.join(KINDS)}"
            )
        try:
            patch[name] = KINDS[change.kind](**change.arrays, **change.static)
        except TypeError as error:
            raise FileFormatError(
                f"`{path}`: the fields of `{name}` are not those of its kind: {error}"
            ) from None
    return patch, file.metadata


def read_patch(path: str | os.PathLike, *, check_finite: bool = True, lazy: bool = False) -> PatchFile:
    """Read and check a patch file without jax; see `load_patch`.

    Args:
      lazy: hold no indices; each entry's are decoded when asked for, after a first time to check them.
    """
    manifest, tensors, digest = read_sealed(path, "patch")
    fields: dict[str, dict[str, np.ndarray]] = {}
    for tensor, array in tensors.items():
        name, _, field = tensor.rpartition("::")
        fields.setdefault(name, {})[field] = array
    specs = touched_specs(path, manifest)
    base_digests = {
        n: _digest(path, take(path, leaf, "digest", str, f"`{n}`")) for n, leaf in manifest["touched"].items()
    }
    results = {n: _digest(path, d) for n, d in take(path, manifest, "results", dict).items()}
    changes: dict[str, Change] = {}
    used: set[str] = set()
    known_at: dict[str, np.ndarray] = {}
    for name, entry in take(path, manifest, "changes", dict).items():
        where = f"the change of `{name}`"
        arrays: Mapping[str, np.ndarray] = fields.get(name, {})
        used |= {f"{name}::{field}" for field in arrays}
        if PRECISION in arrays:
            known_at[name] = fields[name].pop(PRECISION)
        for field, array in arrays.items():
            if check_finite and not _finite(array):
                raise FileFormatError(
                    f"`{path}`: `{name}::{field}` holds NaN or infinity; a patch must be finite"
                )
            release(array)
        if "indices" in arrays:
            note = take(path, entry, "indices", dict, where)
            values = arrays.get("values", arrays.get("codes"))
            if values is not None:  # else `_check_fit` tells what is missing
                decode = partial(_indices.decode_paired, path, name, note, arrays["indices"], values.size)
                arrays = _indices.Decoded(arrays, decode) if lazy else {**arrays, "indices": decode()}
        static = {k: _tuples(v) for k, v in take(path, entry, "static", dict, where).items()}
        changes[name] = Change(take(path, entry, "kind", str, where), arrays, static)
    if extra := sorted(set(tensors) - used):
        raise FileFormatError(f"`{path}` holds the tensor `{extra[0]}`, which its manifest does not mention")
    try:
        _check_fit(changes, specs)
        known_at = precision_at(changes, specs, known_at)
        touched = {t for n, c in changes.items() for t in _kinds.touched(n, c)}
    except FileFormatError:
        raise
    except (StructureError, TypeError, ValueError) as error:
        raise FileFormatError(f"`{path}` contradicts itself: {error}") from None
    exact = {t for n, c in changes.items() if c.kind in _kinds.EXACT for t in _kinds.touched(n, c)}
    if touched != set(specs) or exact != set(results):
        odd = sorted((touched ^ set(specs)) | (exact ^ set(results)))
        raise FileFormatError(f"`{path}` contradicts itself on which leaves it touches: `{odd[0]}`")
    base_id = _digest(path, take(path, manifest, "base", str))
    metadata = take(path, manifest, "metadata", dict)
    lossy = take(path, manifest, "lossy", dict) if "lossy" in manifest else None
    return PatchFile(changes, specs, base_id, base_digests, results, metadata, digest, known_at, lossy)


def touched_specs(path: str | os.PathLike, manifest: Mapping[str, Any]) -> dict[str, Spec]:
    """Return what a patch file's manifest says of the base leaves that it changes."""
    specs: dict[str, Spec] = {}
    for name, leaf in take(path, manifest, "touched", dict).items():
        dtype = take(path, leaf, "dtype", str, f"`{name}`")
        if dtype not in DTYPES:
            raise FileFormatError(f"`{path}`: base leaf `{name}` has the unknown dtype {dtype[:40]!r}")
        specs[name] = Spec(DTYPES[dtype], take_shape(path, leaf, f"`{name}`"))
    return specs


def load_precision(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the precision that travels in a patch file: what `merge.information` takes beside the patch.

    Returns:
      By leaf name, `[N]` at the entries of a sparse patch and `[*p]` of a dense one; empty if the file
      carries none.

    Raises:
      FileFormatError: as `load_patch`.
    """
    return read_patch(path).precision


def _check_fit(changes: Mapping[str, Change], specs: Mapping[str, Spec]) -> None:
    """Raise unless every entry fits the leaves it is for, and no leaf is changed twice."""
    seen: dict[str, str] = {}
    for name, change in changes.items():
        if name not in specs:
            raise StructureError(f"the patch changes `{name}`, which the base does not have")
        if reason := _kinds.problem(name, change, specs):
            raise StructureError(f"the patch of `{name}` does not fit the base: {reason}")
        for target in _kinds.touched(name, change):
            if target in seen:
                raise StructureError(
                    f"`{target}` is changed by both `{seen[target]}` and `{name}` of one patch"
                )
            seen[target] = name


def _finite(array: np.ndarray) -> bool:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def _digest(path: object, text: Any) -> Digest:
    digits = text.removeprefix("sha256:") if type(text) is str else ""
    if text != f"sha256:{digits}" or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise FileFormatError(f"`{path}` has a digest that is none: {str(text)[:80]!r}")
    return text


def _tuples(value: Any) -> Any:
    """Static fields must be hashable: lists of JSON become tuples again."""
    return tuple(_tuples(v) for v in value) if type(value) is list else value
