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

_CHUNK = 1 << 21  # entries compared at a time: so many that threads seldom wait for each other
_SAMPLE = 1 << 15  # places, at most, whose entries give the guess; each may cost a page of a mapped file
_BESIDE = 16  # entries of a place: as many as the processor fetches at once
_ROOM = 1 << 20  # entries that a buffer may hold beyond those wanted
_FEW = 1 << 17  # entries of a buffer looked at at a time
_EVERY = 32  # one of so many entries of a buffer guides the search for its cut
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
        found = Found(*(x[order] for x in found))
    elif found.keys.base is not None and found.keys.base.size > 8 * count:
        found = Found(*(x.copy() for x in found))  # what was passed over is not kept alive
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
    places = min(_SAMPLE, max(size >> 14, 1 << 11))
    if size < 4 * places * _BESIDE:
        return None
    # One draw from each of many equal strides, by the golden ratio: no row of large scores can hide.
    starts = np.arange(places, dtype=np.float64)
    starts += starts * 0.6180339887498949 % 1.0
    starts *= size / places
    ends = np.cumsum([p.entries.size for p in pieces])
    draw = lambda part: _draw(pieces, ends, part, dtype)
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # a place in a mapped file may cost a visit to the system
        shares = np.array_split(np.minimum(starts.astype(np.int64), size - 1), threads)
        sample = np.concatenate(list(pool.map(draw, shares)))
    rank = math.ceil(count / size * sample.size)
    ordered = np.sort(sample, axis=None)[::-1]
    # Neighbours are alike, so that the error is that of a sample of places, not of entries.
    spread = (sample >= ordered[min(rank, sample.size - 1)]).sum(axis=1).std()
    below = rank + math.ceil(4 * (spread * math.sqrt(places) + _BESIDE))
    return ordered[below] if below < sample.size else None


def _draw(pieces: Sequence[Piece], ends: np.ndarray, places: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the entries beside places `[n]`, ascending, among all entries in order, `[n, _BESIDE]`."""
    cuts, beside, drawn = np.searchsorted(places, ends), np.arange(_BESIDE), []
    for p, end, a, b in zip(pieces, ends, [0, *cuts[:-1]], cuts):
        if a < b:
            at = places[a:b] - (end - p.entries.size)
            at -= at % _BESIDE
            at = np.minimum(at[:, None] + beside, p.entries.size - 1)
            drawn.append(p.entries[at].astype(dtype))  # `take` would copy a leaf that is not aligned
    return np.concatenate(drawn) if drawn else np.zeros((0, _BESIDE), dtype)


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
            _best([Found(keys[:held], values[:held])], count)  # written over keys and values
            bound, beyond, held = values[:count].min(), in_order, count  # whoever is later loses every tie
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
    """Return the `count` largest, ties by the lowest keys, in the order in which they came.

    They are written over the first part, where the buffers that it lies in have room: memory that was
    touched before costs nothing.
    """
    surplus = sum(p.keys.size for p in parts) - count
    if surplus <= 0:
        return Found(*(np.concatenate(xs) for xs in zip(*parts, strict=True)))
    few = [Found(*(x[s : s + _FEW] for x in p)) for p in parts for s in range(0, p.keys.size, _FEW)]
    threshold, last = _smallest([p.values for p in few], surplus), None
    if spare := surplus - sum(np.count_nonzero(p.values < threshold) for p in few):
        tied = np.concatenate([p.keys[p.values == threshold] for p in few])
        last = np.partition(tied, -spare - 1)[-spare - 1]  # the key of the last tie that is kept
    found, end = Found(*(_room(x, count) for x in parts[0])), 0
    for part in few:
        keep = part.values >= threshold
        if last is not None:
            keep &= (part.values > threshold) | (part.keys <= last)
        where = keep.nonzero()[0]
        for x, out in zip(part, found, strict=True):
            out[end : end + where.size] = x.take(where)
        end += where.size
    return found


def _smallest(parts: Sequence[np.ndarray], rank: int) -> np.generic:
    """Return the value of a rank, counted from 0, the smallest, among all entries of several arrays."""
    size = sum(x.size for x in parts)
    sample = np.sort(np.concatenate([x[::_EVERY] for x in parts]))
    place, slack = rank / size * sample.size, 4 * math.sqrt(sample.size)
    low, high = (sample[int(min(max(at, 0), sample.size - 1))] for at in (place - slack, place + slack))
    below = sum(np.count_nonzero(x < low) for x in parts)
    inside = np.concatenate([x[(x >= low) & (x <= high)] for x in parts])
    if not below <= rank < below + inside.size:
        below, inside = 0, np.concatenate(parts)
    return np.partition(inside, rank - below)[rank - below]


def _room(part: np.ndarray, count: int) -> np.ndarray:
    """Return `count` entries of the buffer that an array is the beginning of, or new ones."""
    buffer = part.base
    return buffer[:count] if buffer is not None and buffer.size >= count else np.empty(count, part.dtype)


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
