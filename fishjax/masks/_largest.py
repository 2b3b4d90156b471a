"""The k largest of billions of entries, exactly, in one pass and memory of a few k; needs no jax.

A sample gives a bound that a little more than k entries reach. One pass compares every entry with it and
keeps those; the k largest of them are the answer. The guess decides only the speed: a buffer that grows
beyond 1.5 k is cut back to its k best, which raises the bound, and a bound that was too high starts over
without one. So nothing ever holds more than a few k entries, whatever the data.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError

_CHUNK = 1 << 18  # entries compared at a time: a chunk and its bits stay in the cache
_SAMPLE = 1 << 17  # entries that give the guess; each may cost a page of a mapped file
_ROOM = 1 << 20  # entries that a buffer may hold beyond those wanted
_THREADS = 4


class Piece(NamedTuple):
    """Entries of a leaf, and where each stands in the order that decides ties."""

    name: str
    entries: np.ndarray  # [n], real; may be a view of a mapped file
    key: Callable[[np.ndarray], np.ndarray]  # int64 positions in `entries` -> int64 keys, increasing


class Found(NamedTuple):
    keys: np.ndarray  # int64 [n]
    values: np.ndarray  # [n]


def largest(pieces: Sequence[Piece], count: int, *, in_order: bool = True) -> Found:
    """Return the keys, ascending, and the values of the `count` largest entries; ties: lowest keys.

    Args:
      pieces: in any layout; compared by value.
      count: at most the number of entries.
      in_order: keys increase from piece to piece too; ties are then settled while passing.

    Raises:
      UsageError: an entry is NaN; names the leaf.

    >>> x = np.array([3.0, 1.0, 3.0, 2.0])
    >>> largest([Piece("w", x, lambda at: at + 10)], 3)
    Found(keys=array([10, 12, 13]), values=array([3., 3., 2.]))
    """
    size = sum(p.entries.size for p in pieces)
    if not count:
        return Found(np.zeros(0, np.int64), np.zeros(0))
    dtype = functools.reduce(np.promote_types, {_wide(p.entries.dtype) for p in pieces})
    found = _pass(pieces, count, _guess(pieces, count, size, dtype), dtype, in_order)
    if found.keys.size < count:
        found = _pass(pieces, count, None, dtype, in_order)
    found = _best(found, count)
    if not in_order:
        order = np.argsort(found.keys)
        found = Found(found.keys[order], found.values[order])
    return found


def refuse_nan(pieces: Sequence[Piece]) -> None:
    """Raise if an entry is NaN, chunk by chunk.

    Raises:
      UsageError: naming the leaf.
    """
    for piece in pieces:
        if not _is_exact(piece.entries.dtype):
            for start in range(0, piece.entries.size, _CHUNK):
                _check(piece.name, piece.entries[start : start + _CHUNK])


def _guess(pieces: Sequence[Piece], count: int, size: int, dtype: np.dtype) -> np.generic | None:
    """Return a value that with near certainty at least `count` entries reach, and few more; None: any."""
    if size <= 2 * _SAMPLE:
        return None
    # One draw from each of many equal strides: a row of large scores can hide from no stride.
    places = (np.arange(_SAMPLE) + np.random.default_rng(0).random(_SAMPLE)) * (size / _SAMPLE)
    places = np.minimum(places.astype(np.int64), size - 1)
    ends = np.cumsum([p.entries.size for p in pieces])
    cuts = np.searchsorted(places, ends)
    sample = np.concatenate(
        [
            p.entries[places[a:b] - (end - p.entries.size)].astype(dtype)
            for p, end, a, b in zip(pieces, ends, [0, *cuts[:-1]], cuts)
        ]
    )
    rank = count / size * _SAMPLE
    below = math.ceil(rank + 4 * math.sqrt(rank * (1 - count / size)) + 4)
    if below >= _SAMPLE:
        return None
    return np.partition(sample, _SAMPLE - below)[_SAMPLE - below]


def _pass(
    pieces: Sequence[Piece], count: int, bound: np.generic | None, dtype: np.dtype, in_order: bool
) -> Found:
    """Return at least the `count` largest entries that reach the bound, fewer if fewer do."""
    chunks = [(p, s) for p in pieces for s in range(0, p.entries.size, _CHUNK)]
    threads = max(1, min(_THREADS, os.cpu_count() or 1, len(chunks) // 16))
    cuts = [len(chunks) * i // threads for i in range(threads + 1)]
    shares = [chunks[a:b] for a, b in itertools.pairwise(cuts)]
    work = lambda share: _gather(share, count, bound, dtype, in_order)
    if threads == 1:
        return work(chunks)
    with ThreadPoolExecutor(threads) as pool:
        return _join(list(pool.map(work, shares)), dtype)


def _gather(
    chunks: Sequence[tuple[Piece, int]],
    count: int,
    bound: np.generic | None,
    dtype: np.dtype,
    in_order: bool,
) -> Found:
    """Pass over chunks, with a buffer of at most 1.5 `count` entries or so."""
    room = count + max(count // 2, _ROOM)
    bits = np.empty(_CHUNK, bool)
    kept: list[Found] = []
    held, beyond = 0, False  # `beyond`: only more than the bound will do
    for piece, start in chunks:
        part = piece.entries[start : start + _CHUNK].astype(dtype, copy=False)
        if bound is None:
            where = np.arange(part.size)
        else:  # what is not less, so that NaN is kept, and seen
            short = (np.less_equal if beyond else np.less)(part, bound, out=bits[: part.size])
            where = np.flatnonzero(np.logical_not(short, out=short))
        if not where.size:
            continue
        values = part[where]
        _check(piece.name, values)
        kept.append(Found(piece.key(where + start), values))
        held += where.size
        if held > room:
            best = _best(_join(kept, dtype), count)
            bound, beyond = best.values.min(), in_order  # whoever comes later loses every tie
            kept, held = [best], count
    return _join(kept, dtype)


def _best(found: Found, count: int) -> Found:
    """Return the `count` largest, ties by the lowest keys, in the order in which they came."""
    surplus = found.values.size - count
    if surplus <= 0:
        return found
    threshold = np.partition(found.values, surplus)[surplus]
    keep = found.values > threshold
    tied = np.flatnonzero(found.values == threshold)
    wanted = count - int(np.count_nonzero(keep))
    if wanted < tied.size:
        tied = tied[np.argpartition(found.keys[tied], wanted - 1)[:wanted]]
    keep[tied] = True
    return Found(found.keys[keep], found.values[keep])


def _join(parts: Sequence[Found], dtype: np.dtype) -> Found:
    if not parts:
        return Found(np.zeros(0, np.int64), np.zeros(0, dtype))
    return Found(np.concatenate([p.keys for p in parts]), np.concatenate([p.values for p in parts]))


def _check(name: str, values: np.ndarray) -> None:
    if not _is_exact(values.dtype) and np.isnan(values).any():
        raise UsageError(f"`scores` must not be NaN; `{name}` has NaN (compute the scores again)")


def _wide(dtype: np.dtype) -> np.dtype:
    """Return the dtype to compare in: bfloat16 and the like widened to float32, which is exact."""
    return dtype if _is_exact(dtype) else tree.wide_dtype(dtype)


def _is_exact(dtype: np.dtype) -> bool:
    return dtype.kind in "iub"


def keys_of(leaves: Mapping[str, Any]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return for each leaf what makes a flat position its place among all entries in order."""
    offsets = itertools.accumulate((x.size for x in leaves.values()), initial=0)
    return {name: functools.partial(np.add, offset) for name, offset in zip(leaves, offsets)}
