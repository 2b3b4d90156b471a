"""Exact order statistics of arrays that are seen block by block, in memory of fixed size.

Floats >= 0 are ordered as their bit patterns are. What lies in a span of patterns that holds the answer
is kept if it is little; else the span is cut into at most 2^18 bins and counted, until a bin is one
pattern. A sample makes the first span so narrow that one pass is mostly enough; should the answer lie
outside, the next pass takes the whole range.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 1 << 18
KEPT = 1 << 18  # entries of a span that are kept as they are
SAMPLE = 1 << 19  # entries of an array that give a first guess of its order


def sample_size(size: int, pieces: int) -> int:
    """Return how many entries of each piece give the first guess of an array of `size` entries."""
    return max(16, min(SAMPLE, size // 16) // pieces)  # sorting is one thread's work


class _Search(NamedTuple):
    array: int  # which of the ranked arrays
    k: int  # wanted: the k-th largest
    low: int  # the span of bit patterns, [low, high)
    high: int

    @property
    def shift(self) -> int:
        return max(0, (self.high - self.low - 1).bit_length() - (BINS.bit_length() - 1))


class Ranking:
    """Searches for the k-th largest values of several arrays, all in the same passes."""

    def __init__(self, counts: Sequence[Sequence[int]]):
        self._counts = counts
        self._searches: list[_Search] = []
        self._counted = False  # a guess is not yet an answer
        self._bits, self._float = np.dtype(np.uint32), np.dtype(np.float32)
        self._above: list[int] = []
        self._equal: list[int] = []  # entries of a span that is one pattern
        self._held: list[int] = []  # entries that are kept
        self._bins: list[np.ndarray | None] = []  # None while what is inside is kept
        self._waiting: list[list[np.ndarray]] = []  # entries inside that are in no bin yet

    @property
    def done(self) -> bool:
        return self._counted and all(s.high - s.low == 1 for s in self._searches)

    def guess(self, samples: Sequence[np.ndarray], size: int) -> None:
        """Begin with spans around each answer's place in a sample."""
        self._float = samples[0].dtype
        self._bits = np.dtype(f"u{self._float.itemsize}")
        searches = []
        for i, (sample, ks) in enumerate(zip(samples, self._counts, strict=True)):
            ordered = np.sort(sample)[::-1]
            for k in ks:
                if not k:
                    searches.append(_Search(i, 0, self._whole() - 1, self._whole()))
                    continue
                rank = k / size * ordered.size
                slack = 6 * math.sqrt(rank * (1 - k / size)) + 3
                above, below = int(rank - slack), math.ceil(rank + slack)
                low = self._pattern(ordered[below]) if below < ordered.size else 0
                high = self._pattern(ordered[above]) + 1 if above >= 0 else self._whole()
                searches.append(_Search(i, k, low, high))
        self._begin(searches)

    def count(self, arrays: Sequence[np.ndarray]) -> list[tuple[int, np.ndarray | int]]:
        """Return for each search how many entries lie above its span, and each inside, less its low end.

        Of a span that is one pattern, such as the zeros of a sparse change, their number is enough.
        """
        found: list[tuple[int, np.ndarray | int]] = []
        patterns = [np.ascontiguousarray(x).view(self._bits) for x in arrays]
        for s in self._searches:
            bits = patterns[s.array]
            beyond = bits >= self._bits.type(s.high)
            above = int(np.count_nonzero(beyond))
            if s.high - s.low == 1:
                found.append((above, int(np.count_nonzero(bits == self._bits.type(s.low)))))
                continue
            inside = (bits >= self._bits.type(s.low)) ^ beyond
            found.append((above, bits.take(inside.nonzero()[0]) - self._bits.type(s.low)))
        return found

    def add(self, found: Sequence[tuple[int, np.ndarray | int]]) -> None:
        """Add what `count` found. Few entries are inside and bins are many, so they are counted in bulk."""
        for i, (above, inside) in enumerate(found):
            self._above[i] += above
            if isinstance(inside, int):
                self._equal[i] += inside
                continue
            self._waiting[i].append(inside)
            self._held[i] += inside.size
            if self._held[i] > KEPT:
                self._count_waiting(i)

    def narrow(self) -> None:
        """Take the bin that holds each answer as its next span."""
        self._counted = True
        searches = []
        for i, (s, above) in enumerate(zip(self._searches, self._above, strict=True)):
            if s.high - s.low == 1:
                found = s.k == 0 or above < s.k <= above + self._equal[i]
                searches.append(s if found else s._replace(low=0, high=self._whole()))
                continue
            bins = self._bins[i]
            if bins is None:
                inside = np.concatenate([*self._waiting[i], np.zeros(0, self._bits)])
                if above < s.k <= above + inside.size:
                    place = inside.size - (s.k - above)
                    low = s.low + int(np.partition(inside, place)[place])
                    searches.append(s._replace(low=low, high=low + 1))
                else:
                    searches.append(s._replace(low=0, high=self._whole()))
                continue
            bins = self._count_waiting(i)
            from_top = above + np.cumsum(bins[::-1])
            if not above < s.k <= from_top[-1]:
                searches.append(s._replace(low=0, high=self._whole()))
                continue
            place = bins.size - 1 - int(np.searchsorted(from_top, s.k))
            low = s.low + (place << s.shift)
            searches.append(s._replace(low=low, high=min(low + (1 << s.shift), s.high)))
        self._begin(searches)

    def values(self) -> list[list[float]]:
        """Return what was found, for each array and k; infinity for k = 0."""
        answers = iter(np.array([s.low for s in self._searches], self._bits).view(self._float).tolist())
        return [[next(answers) for _ in ks] for ks in self._counts]

    def _count_waiting(self, i: int) -> np.ndarray:
        """Put what is kept of a search into bins, and return them."""
        search, bins = self._searches[i], self._bins[i]
        if bins is None:
            bins = self._bins[i] = np.zeros(min(BINS, search.high - search.low), np.int64)
        places = np.concatenate([*self._waiting[i], np.zeros(0, self._bits)])
        places >>= self._bits.type(search.shift)
        bins += np.bincount(places.astype(np.int64), minlength=bins.size)
        self._waiting[i], self._held[i] = [], 0
        return bins

    def _begin(self, searches: list[_Search]) -> None:
        self._searches = searches
        self._above, self._equal, self._held = ([0] * len(searches) for _ in range(3))
        self._bins = [None for _ in searches]
        self._waiting = [[] for _ in searches]

    def _whole(self) -> int:
        return self._pattern(np.array(np.inf, self._float)) + 1

    def _pattern(self, value: np.ndarray) -> int:
        return int(np.array([value], self._float).view(self._bits)[0])
