"""What each kind of patch means on the host: the numpy twin of `patches`, for files, without jax.

Dense, sparse and scale give the same bits as `patches.apply`; a low-rank product depends on the
machine, so its result has no digest. A kind without a twin here goes through its own `fold`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax.checkpoint._dtypes import Spec
from fishjax.errors import FileFormatError
from fishjax.tree import wide_dtype


class Change(NamedTuple):
    """One entry of a patch as it is in a file: a kind's name, its arrays and its static fields."""

    kind: str
    arrays: Mapping[str, np.ndarray]
    static: dict[str, Any]


EXACT = ("dense", "sparse", "scale", "delta")  # the result has a digest


def touched(name: str, change: Change) -> list[str]:
    """Return the names of the leaves that an entry changes: its own, and those tied to it."""
    return [name, *(str(other) for other, _ in change.static.get("tied", ()))]


def problem(name: str, change: Change, specs: Mapping[str, Spec]) -> str | None:
    """Return why an entry does not fit the leaves it is for, or None.

    Args:
      specs: dtype and shape of at least the leaves that it touches.
    """
    check: dict[str, Callable[..., str | None]] = {
        "dense": _check_dense,
        "sparse": _check_sparse,
        "low_rank": _check_low_rank,
        "scale": _check_scale,
        "delta": _check_delta,
    }
    if change.kind not in check:
        return None
    try:
        return check[change.kind](name, specs, **change.arrays, **change.static)
    except TypeError as error:
        return f"its fields are not those of kind `{change.kind}`: {error}"


def fold(name: str, change: Change, target: str, weight: np.ndarray) -> np.ndarray:
    """Return the new value of the leaf `target`, one of those that the entry touches.

    >>> change = Change("sparse", {"indices": np.array([1]), "values": np.array([9.0])}, {})
    >>> fold("w", change, "w", np.array([1.0, 2.0]))
    array([1., 9.])
    """
    twins: dict[str, Callable[..., np.ndarray]] = {
        "dense": _fold_dense,
        "sparse": _fold_sparse,
        "low_rank": _fold_low_rank,
        "scale": _fold_scale,
        "delta": _fold_delta,
    }
    if change.kind in twins:
        with np.errstate(all="ignore"):  # what overflows is infinite, as it is on a device
            return twins[change.kind](weight, name=name, target=target, **change.arrays, **change.static)
    from fishjax.patches import KINDS

    if change.kind not in KINDS:
        raise FileFormatError(f"`{name}` is patched by kind `{change.kind}`; known: {', '.join(KINDS)}")
    kind = KINDS[change.kind](**change.arrays, **change.static)
    return np.asarray(kind.fold(name, {target: weight})[target])


def rows(name: str, change: Change, target: str, shape: tuple[int, ...], first: int, last: int) -> Change:
    """Return what an entry does to rows `first` to `last` of a leaf, as an entry for those rows alone.

    A row is the last axis (of a vector one number), all others are counted through. Folded into
    the rows, under the name `target`, it gives the bits that the whole entry gives the leaf there.

    Args:
      target, shape: the leaf, one of those that the entry touches.

    >>> change = Change("sparse", {"indices": np.array([1, 5]), "values": np.array([9.0, 8.0])}, {})
    >>> rows("w", change, "w", (3, 2), 2, 3).arrays
    {'indices': array([1]), 'values': array([8.])}
    """
    arrays, static, width = change.arrays, change.static, math.prod(shape[1:][-1:])
    if change.kind in ("sparse", "delta"):
        begin, end, new = first * width, last * width, dict(arrays)
        if (indices := arrays.get("indices")) is not None:
            begin, end = np.searchsorted(indices, np.array([begin, end], indices.dtype))
            new["indices"] = indices[begin:end] - indices.dtype.type(first * width)
        if change.kind == "sparse":
            return Change("sparse", {**new, "values": arrays["values"][begin:end]}, static)
        each = arrays["scales"][np.arange(begin, end) // static["block"]]
        return Change("delta", {**new, "codes": arrays["codes"][begin:end], "scales": each}, {"block": 1})
    if change.kind == "scale":
        fused, vector = static.get("fused"), arrays["vector"]
        vector = vector if fused is None else _spread(vector, fused)
        vector = vector if target == name else vector.reshape(dict(static["tied"])[target])
        return Change("scale", {"vector": _rows(vector, shape, first, last)}, {})
    if change.kind in ("dense", "low_rank"):
        return Change(change.kind, {f: _rows(x, shape, first, last) for f, x in arrays.items()}, static)
    raise FileFormatError(f"`{name}` is patched by kind `{change.kind}`, which has no meaning row by row")


def _rows(x: np.ndarray, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    """Return rows of what spans some axes of a leaf and is 1 along the others; more axes may follow."""
    counted = shape[:-1] or shape
    if x.shape[: len(counted)] == (1,) * len(counted):
        return x.reshape(1, *x.shape[len(counted) :])
    places = np.unravel_index(np.arange(first, last), counted)
    return x[tuple(np.minimum(place, n - 1) for place, n in zip(places, x.shape))]


def _check_dense(name: str, specs: Mapping[str, Spec], values: np.ndarray) -> str | None:
    if values.shape != specs[name].shape:
        return f"its values have shape {list(values.shape)}, the leaf {list(specs[name].shape)}"
    return None


def _check_sparse(name, specs: Mapping[str, Spec], indices: np.ndarray, values: np.ndarray) -> str | None:
    size = math.prod(specs[name].shape)
    if indices.ndim != 1 or indices.shape != values.shape:
        return f"{list(indices.shape)} indices and {list(values.shape)} values do not pair"
    if indices.dtype.kind not in "iu":
        return f"its indices are {indices.dtype}, wanted integers"
    if indices.size and int(indices.max()) >= 1 << 63:
        return f"its indices reach {indices.max()}, the leaf has {size} entries"
    where = indices.astype(np.int64)
    if (where[1:] <= where[:-1]).any():  # not their difference, which could wrap
        return "its indices are not strictly increasing"
    if where.size and (where[0] < 0 or where[-1] >= size):
        return f"its indices reach from {where[0]} to {where[-1]}, the leaf has {size} entries"
    return None


def _check_low_rank(
    name, specs: Mapping[str, Spec], a: np.ndarray, b: np.ndarray, scale: float = 1.0
) -> str | None:
    shape = specs[name].shape
    fits = a.ndim == b.ndim == len(shape) + 1 and a.shape[-1] == b.shape[-1]
    if not fits or not all({x, y} == {1, n} for x, y, n in zip(a.shape, b.shape, shape)):
        return f"factors {list(a.shape)} and {list(b.shape)} do not span the leaf's shape {list(shape)}"
    return None if type(scale) in (int, float) and math.isfinite(scale) else f"its scale is {scale}"


def _check_scale(name, specs: Mapping[str, Spec], vector: np.ndarray, tied=(), fused=None) -> str | None:
    if fused is not None:
        if len(fused) != 4 or not all(type(n) is int for n in fused):
            return f"`fused` must be four integers; got {fused}"
        axis, parts, first, size = fused
        if not (0 <= axis < vector.ndim and 0 < first < parts and size > 0):
            return f"`fused` {tuple(fused)} describes no axis of a vector {list(vector.shape)}"
        if vector.shape[axis] % ((parts - first) * size):
            return f"{vector.shape[axis]} entries are not whole groups of {parts - first} parts of {size}"
        if parts * size > max(specs[name].shape, default=0):  # before anything of that size is made
            return f"`fused` {tuple(fused)} is longer than the leaf {list(specs[name].shape)}"
        vector = _spread(vector, fused)
    for other, shape in ((name, vector.shape), *tied):
        if other not in specs:
            return f"the tied leaf `{other}` is not there"
        if len(shape) != len(specs[other].shape) or any(
            m not in (1, n) for m, n in zip(shape, specs[other].shape)
        ):
            return f"a vector {list(shape)} does not broadcast to `{other}` {list(specs[other].shape)}"
        if math.prod(shape) != vector.size:
            return f"a vector of {vector.size} entries cannot be shaped {list(shape)} for `{other}`"
    return None


def _check_delta(
    name,
    specs: Mapping[str, Spec],
    codes: np.ndarray,
    scales: np.ndarray,
    block: int,
    indices: np.ndarray | None = None,
) -> str | None:
    if codes.dtype != np.int8 or codes.ndim != 1 or scales.ndim != 1 or scales.dtype.kind != "f":
        return f"its codes are {codes.dtype} and its scales {scales.dtype}; wanted int8 [N] and floats [n]"
    if type(block) is not int or block < 1 or scales.size != -(-codes.size // block):
        return f"{codes.size} codes cannot share {scales.size} scales in blocks of {block}"
    if (np.frexp(scales)[0] != 0.5).any():  # then code * scale is exact, and all machines agree
        return "its scales are not powers of two"
    if indices is not None:
        return _check_sparse(name, specs, indices, codes)
    size = math.prod(specs[name].shape)
    return None if codes.size == size else f"it has {codes.size} codes, the leaf {size} entries"


def _fold_dense(weight: np.ndarray, *, values: np.ndarray, **_) -> np.ndarray:
    return values.astype(weight.dtype, copy=False)


def _fold_sparse(weight: np.ndarray, *, indices: np.ndarray, values: np.ndarray, **_) -> np.ndarray:
    new = np.array(weight, order="C")
    new.reshape(-1)[indices.astype(np.int64)] = values.astype(weight.dtype)
    return new


def _fold_low_rank(
    weight: np.ndarray, *, a: np.ndarray, b: np.ndarray, scale: float = 1.0, **_
) -> np.ndarray:
    """Sum the products one after another, entry by entry, so that the result is the same everywhere."""
    wide = wide_dtype(np.result_type(wide_dtype(a.dtype), wide_dtype(b.dtype), weight.dtype))
    delta = np.zeros(weight.shape, wide)
    for i in range(a.shape[-1]):
        delta += a[..., i].astype(wide) * b[..., i].astype(wide)
    delta *= wide.type(scale)
    delta += weight.astype(wide)
    return delta.astype(weight.dtype)


def _fold_scale(
    weight: np.ndarray, *, vector: np.ndarray, name: str, target: str, tied=(), fused=None
) -> np.ndarray:
    """One multiply in float32 (float64 for a float64 leaf) and one rounding."""
    vector = vector if fused is None else _spread(vector, fused)
    shape = vector.shape if target == name else dict(tied)[target]
    wide = wide_dtype(weight.dtype)
    return (weight.astype(wide) * vector.reshape(shape).astype(wide)).astype(weight.dtype)


def _spread(vector: np.ndarray, fused: Sequence[int]) -> np.ndarray:
    """Lay a vector about the parts from `first` on over the whole axis, with ones before."""
    axis, parts, first, size = fused
    before, after = vector.shape[:axis], vector.shape[axis + 1 :]
    mine = vector.reshape(*before, -1, parts - first, size, *after)
    ones = np.ones((*before, mine.shape[axis], first, size, *after), vector.dtype)
    return np.concatenate([ones, mine], axis + 1).reshape(*before, -1, *after)


def _fold_delta(
    weight: np.ndarray,
    *,
    codes: np.ndarray,
    scales: np.ndarray,
    block: int,
    indices: np.ndarray | None = None,
    **_,
) -> np.ndarray:
    """One exact product, one sum in max(float32, dtype), one rounding."""
    wide = wide_dtype(weight.dtype)
    delta = codes.astype(wide) * np.repeat(scales.astype(wide), block)[: codes.size]
    new = np.array(weight, order="C")
    flat = new.reshape(-1)
    where = slice(None) if indices is None else indices.astype(np.int64)
    flat[where] = (flat[where].astype(wide) + delta).astype(weight.dtype)
    return new
