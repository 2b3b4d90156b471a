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

_CHUNK = 1 << 19  # entries compared at a time: few enough for the cache, and enough that threads seldom meet
_SAMPLE = 1 << 16  # entries that give the guess; each may cost a page of a mapped file
_ROOM = 1 << 20  # entries that a buffer may hold beyond those wanted
_FEW = 1 << 17  # entries of a buffer looked at at a time
_THREADS = 4
_ALL, _NONE = np.uint64(0x0101010101010101), np.uint64(0)  # eight bools that are True, and False


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
    parts = _pass(pieces, count, _guess(pieces, count, size, dtype), dtype, in_order)
    if sum(p.keys.size for p in parts) < count:
        parts = _pass(pieces, count, None, dtype, in_order)
    found = _best(parts, count)
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
    # One draw from each of many equal strides, by the golden ratio: no row of large scores can hide.
    places = np.arange(_SAMPLE, dtype=np.float64)
    places += places * 0.6180339887498949 % 1.0
    places *= size / _SAMPLE
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
) -> list[Found]:
    """Return at least the `count` largest entries that reach the bound, fewer if fewer do; by thread."""
    chunks = [(p, s) for p in pieces for s in range(0, p.entries.size, _CHUNK)]
    threads = max(1, min(_THREADS, os.cpu_count() or 1, len(chunks) // 16))
    cuts = [len(chunks) * i // threads for i in range(threads + 1)]
    shares = [chunks[a:b] for a, b in itertools.pairwise(cuts)]
    work = lambda share: _gather(share, count, bound, dtype, in_order)
    if threads == 1:
        return [work(chunks)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, shares))


def _gather(
    chunks: Sequence[tuple[Piece, int]],
    count: int,
    bound: np.generic | None,
    dtype: np.dtype,
    in_order: bool,
) -> Found:
    """Pass over chunks, with a buffer of at most 1.5 `count` entries or so."""
    room = count + max(count // 2, _ROOM)
    # One buffer from the first entry to the last: memory that is touched anew is what a first call costs.
    size = min(room + _CHUNK, sum(min(_CHUNK, p.entries.size - s) for p, s in chunks))
    keys, values = np.empty(size, np.int64), np.empty(size, dtype)
    short = np.empty(_CHUNK + 8, bool)
    held, beyond = 0, False  # `beyond`: only more than the bound will do
    for piece, start in chunks:
        part = piece.entries[start : start + _CHUNK].astype(dtype, copy=False)
        if bound is None:
            where = np.arange(part.size)
        else:  # what is not less, so that NaN is kept, and seen
            (np.less_equal if beyond else np.less)(part, bound, out=short[: part.size])
            short[part.size : part.size + 8] = True
            where = _unset(short[: -(-part.size // 8) * 8])
        new = slice(held, held + where.size)
        part.take(where, out=values[new], mode="clip")
        _check(piece.name, values[new])
        where += start
        keys[new] = piece.key(where)
        held = new.stop
        if held > room:
            best = _best([Found(keys[:held], values[:held])], count)
            keys[:count], values[:count] = best
            bound, beyond, held = best.values.min(), in_order, count  # whoever comes later loses every tie
    return Found(keys[:held], values[:held])


def _unset(flags: np.ndarray) -> np.ndarray:
    """Return where bools `[n]`, n a multiple of 8, are False.

    Nearly all are True, so eight are looked at at a time, and of the rest again, where n allows.
    """
    words = flags.view(np.uint64)
    some = words != _ALL
    if some.size % 8:
        rows = some.nonzero()[0]
    else:
        groups = (some.view(np.uint64) != _NONE).nonzero()[0]  # of bools it is found faster
        rows = _spread(groups, some.view(np.uint64).take(groups).view(bool))
    return _spread(rows, ~words.take(rows).view(bool))


def _spread(rows: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Return the places of flags `[8 n]` that are set, of which eight lie in each of n rows."""
    hits = flags.nonzero()[0]
    places = rows.take(hits >> 3)
    places <<= 3
    hits &= 7
    places += hits
    return places


def _best(parts: Sequence[Found], count: int) -> Found:
    """Return the `count` largest, ties by the lowest keys, in the order in which they came."""
    every = np.concatenate([p.values for p in parts])
    surplus = every.size - count
    if surplus <= 0:
        return Found(np.concatenate([p.keys for p in parts]), every)
    every.partition(surplus)
    threshold, last = every[surplus], None
    few = [Found(*(x[s : s + _FEW] for x in p)) for p in parts for s in range(0, p.keys.size, _FEW)]
    if spare := np.count_nonzero(every[:surplus] == threshold):
        tied = np.concatenate([p.keys[p.values == threshold] for p in few])
        last = np.partition(tied, -spare - 1)[-spare - 1]  # the key of the last tie that is kept
    found, end = Found(np.empty(count, np.int64), every[:count]), 0
    for part in few:
        keep = part.values >= threshold
        if last is not None:
            keep &= (part.values > threshold) | (part.keys <= last)
        where = keep.nonzero()[0]
        for x, out in zip(part, found, strict=True):
            x.take(where, out=out[end : end + where.size], mode="clip")
        end += where.size
    return found


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
