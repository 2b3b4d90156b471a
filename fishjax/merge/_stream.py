"""The streaming engine: rules applied block by block, by two threads that read and compute in turn.

Blocks begin at multiples of `GRAIN`, sums are taken grain by grain and added exactly, and rules go
entry by entry, so that the result is the same bits however the work is cut.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._blocks import Buffers
from fishjax.merge._plan import Job, measured_together
from fishjax.merge._rule import Block, Rule
from fishjax.merge._select import Ranking, sample_size
from fishjax.merge._statistics import GRAIN, grain_sums, largest, widen
from fishjax.merge._trees import check_beside

BLOCK = 1 << 19  # entries: so many that two threads seldom wait for each other; memory grows with them
THREADS = 2


class Piece(NamedTuple):
    """Some entries of a job."""

    job: int
    start: int
    stop: int


class Engine:
    """Jobs, the threads that work on them, and one set of buffers a thread."""

    def __init__(
        self, jobs: Sequence[Job], rules: Mapping[str, Rule], *, block: int = BLOCK, threads: int = THREADS
    ):
        self.jobs, self.rules = jobs, rules
        self.block = max(1, math.ceil(block / GRAIN)) * GRAIN
        self.measured: list[Sequence[Any]] = [()] * len(jobs)
        self._pool = ThreadPoolExecutor(threads)
        # The C library learns from the largest piece of memory that is freed how much to keep; otherwise
        # every temporary array would go back to the system and be taken again, page by page.
        np.empty(1 << 24, np.uint8)
        self._local = threading.local()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, jobs: Iterable[int] | None = None) -> list[Piece]:
        """Return the blocks of all jobs, or of some, in order."""
        found = []
        for j in range(len(self.jobs)) if jobs is None else jobs:
            size, step = self.jobs[j].models[0].size, self.jobs[j].entries(self.block)
            found += [Piece(j, start, min(start + step, size)) for start in range(0, size, step)]
        return found

    def map(self, fn: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
        """Yield `fn` of every item, in order, computed by the threads; few results wait at a time."""
        ahead = 8
        futures = [self._pool.submit(fn, p) for p in pieces[:ahead]]
        for i in range(len(pieces)):
            result = futures[i % ahead].result()
            if i + ahead < len(pieces):
                futures[i % ahead] = self._pool.submit(fn, pieces[i + ahead])
            yield result

    def merged(self, piece: Piece) -> np.ndarray:
        """Return a piece's merged entries in the output's dtype."""
        job = self.jobs[piece.job]
        if job.rule == "copy":
            return self._copied(job, piece)
        block = self.read(piece)
        check_beside([block])
        with np.errstate(over="ignore", invalid="ignore"):
            merged = self.rules[job.rule].leaf(
                block._replace(measured=self.measured[piece.job]), **job.options
            )
        with np.errstate(over="raise", invalid="ignore"):
            try:
                return np.atleast_1d(merged).astype(job.spec.dtype, copy=False)
            except FloatingPointError:
                raise UsageError(
                    f"`{job.name}` has entries beyond what {job.spec.dtype} can hold; give a wider `dtype`, "
                    "or take it from one model by `keep`"
                ) from None

    def read(self, piece: Piece) -> Block:
        """Return a piece's entries of every input, widened."""
        job, buffers = self.jobs[piece.job], self._buffers()
        dtype = tree.wide_dtype(np.result_type(*[t.spec.dtype for t in job.models]))
        read = lambda slot, tensor: buffers.read_wide(slot, tensor, piece.start, piece.stop, dtype)
        positions = None
        if self.rules[job.rule].random:
            positions = np.arange(
                piece.start, piece.stop, dtype=np.uint32 if piece.stop <= 2**32 else np.uint64
            )
        return Block(
            name=job.name,
            models=[read(i, t) for i, t in enumerate(job.models)],
            base=None if job.base is None else read("base", job.base),
            beside={w: [read((w, i), t) for i, t in enumerate(ts)] for w, ts in job.beside.items()},
            positions=positions,
        )

    def measure(self, track: Callable[[Iterable[Any], str, int], Iterable[Any]]) -> None:
        """Take the sums and ranks that rules ask for; `track(items, description, total)` shows it."""
        groups = measured_together(self.jobs, self.rules)
        rule_of = lambda js: self.rules[self.jobs[js[0]].rule]
        summed = [js for js in groups if rule_of(js).sums is not None]
        pieces = self.pieces(j for js in summed for j in js)
        if pieces:
            sums: dict[int, list[list[float]]] = {}
            results = track(self.map(self._sums, pieces), "measuring", len(pieces))
            for piece, grains in zip(pieces, results, strict=True):
                lists = sums.setdefault(piece.job, [[] for _ in grains])
                for column, more in zip(lists, grains, strict=True):
                    column.extend(more)
            for js in summed:
                terms = zip(*(sums[j] for j in js if j in sums), strict=True)
                totals = [math.fsum(math.fsum(c) for c in leaves) for leaves in terms]
                for j in js:
                    self.measured[j] = totals
        ranked = [js for js in groups if rule_of(js).ranks is not None]
        if len(ranked) > 1:  # a tensor a thread: none waits for the end of another one's pass
            found: Iterable[Any] = self.map(lambda js: self._thresholds(js, map), ranked)
        else:
            found = (self._thresholds(js, self.map) for js in ranked)
        for js, values in zip(ranked, track(found, "ranking", len(ranked)) if ranked else (), strict=True):
            for j in js:
                self.measured[j] = values

    def _thresholds(
        self, jobs: Sequence[int], over: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
    ) -> list[list[float]]:
        """Return, for each ranked array and k, the k-th largest value over some jobs; `over` maps pieces."""
        first = self.jobs[jobs[0]]
        rule = self.rules[first.rule]
        size = sum(self.jobs[j].models[0].size for j in jobs)
        ranks = lambda piece: rule.ranks(self.read(piece), **self.jobs[piece.job].options)  # type: ignore[misc]
        counts = rule.counts(size, **first.options)  # type: ignore[misc]
        pieces = self.pieces(jobs)
        if len(pieces) <= 1:
            arrays = ranks(pieces[0]) if pieces else [np.zeros(0, np.float32)] * len(counts)
            return [largest(x, ks) for x, ks in zip(arrays, counts, strict=True)]
        ranking = Ranking(counts)
        few = sample_size(size, len(pieces))
        sample = [p._replace(stop=min(p.stop, p.start + few)) for p in pieces]
        ranking.guess([np.concatenate(xs) for xs in zip(*over(ranks, sample), strict=True)], size)
        while not ranking.done:
            for found in over(lambda piece: ranking.count(ranks(piece)), pieces):
                ranking.add(found)
            ranking.narrow()
        return ranking.values()

    def _sums(self, piece: Piece) -> list[list[float]]:
        job = self.jobs[piece.job]
        block = self.read(piece)
        check_beside([block])
        terms = self.rules[job.rule].sums(widen(block, np.dtype(np.float64)), **job.options)  # type: ignore[misc]
        return [grain_sums(t) for t in terms]

    def _copied(self, job: Job, piece: Piece) -> np.ndarray:
        read = lambda i, tensor: self._buffers().read(i, tensor, piece.start, piece.stop).view(np.uint8)
        first, *others = (read(i, tensor) for i, tensor in enumerate(job.models))
        for i, other in enumerate(others, 1):
            if not np.array_equal(first, other):
                raise StructureError(
                    f"`{job.name}` is {job.spec.dtype}, which cannot be averaged, and differs between "
                    f"model 0 and model {i}; take it from one model by `keep`"
                )
        return first

    def _buffers(self) -> Buffers:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        return self._local.buffers
