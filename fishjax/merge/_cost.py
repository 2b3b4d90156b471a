"""What a merge of files will take, told from headers alone."""

import os
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.checkpoint import open_params
from fishjax.checkpoint._dtypes import num_bytes
from fishjax.merge._blocks import HASHED, Tensor
from fishjax.merge._output import carried_files
from fishjax.merge._plan import File, Job, measured_together
from fishjax.merge._rule import Block, Rule
from fishjax.merge._select import BINS, KEPT, sample_size
from fishjax.merge._statistics import measure
from fishjax.merge._unpack import Patched, is_patch

SMALL = 2 << 20  # bytes that headers, threads and the rest of Python take, about


class Cost(NamedTuple):
    """What a merge of files will take."""

    read: int  # bytes, all passes
    write: int  # bytes
    memory: int  # bytes beyond the interpreter, about


def cost(
    jobs: Sequence[Job],
    rules: Mapping[str, Rule],
    *,
    out: File | None,
    sources: Sequence[File],
    beside: Sequence[File],
    carried: File,
    digests: bool,
    block: int,
    threads: int,
) -> Cost:
    """Return what `run_jobs` will read, write and hold with the same arguments; no `out` is a folder.

    It reads: files with checksums and the bases of patches, to check them; what rules measure; every
    input, to merge it; for content ids the output, and for a folder's card the inputs once more.
    """
    made = sum(num_bytes(*job.spec) for job in jobs)
    read = _checked(jobs) + _measured(jobs, rules, block) + sum(map(_inputs, jobs))
    folder = out is None or Path(out).suffix != ".safetensors"
    more = sum(p.stat().st_size for p in carried_files(Path(carried))) if folder else 0
    if digests:
        read += made + (sum(map(_stored, {*sources, *beside})) if folder else 0)
    return Cost(read + more, made + more, _held(jobs, rules, digests, block, threads))


def _inputs(job: Job) -> int:
    return sum(num_bytes(*t.spec) for _, t in job.inputs())


def _stored(path: File) -> int:
    """Return the bytes of a model's tensors; of a patch, whose digest is in its header, none."""
    if is_patch(path):
        return 0
    with open_params(path) as tensors:
        return sum(num_bytes(*s) for s in tensors.specs.values())


def _checked(jobs: Sequence[Job]) -> int:
    """Return the bytes that are read to see that files with checksums, and bases of patches, are right."""
    tensors = {t for job in jobs for _, t in job.inputs()}
    patched = [t for t in tensors if isinstance(t, Patched)]
    sealed = {t.path for t in tensors if isinstance(t, Tensor) and t.sealed}
    sizes = [os.stat(path).st_size for path in sealed] + [p.bytes for p in {t.patch for t in patched}]
    return sum(sizes) + sum(num_bytes(*base.spec) for base in {t.base for t in patched})


def _measured(jobs: Sequence[Job], rules: Mapping[str, Rule], block: int) -> int:
    """Return the bytes that are read for sums, in one pass, and for ranks, in a sample and one pass.

    Values that lie very close to each other cost ranks another pass.
    """
    read = 0
    for group in measured_together(jobs, rules):
        members = [jobs[j] for j in group]
        sizes = [job.models[0].size for job in members]
        pieces = [-(-n // job.entries(block)) for job, n in zip(members, sizes, strict=True)]
        ranked = rules[members[0].rule].ranks is not None and sum(pieces) > 1
        read += sum(map(_inputs, members))
        if ranked:
            few = sample_size(sum(sizes), sum(pieces))
            for job, n, count in zip(members, sizes, pieces, strict=True):
                read += min(n, few * count) * _inputs(job) // max(1, n)
    return read


def _held(jobs: Sequence[Job], rules: Mapping[str, Rule], digests: bool, block: int, threads: int) -> int:
    """Return the most bytes that are held at once: every thread's buffers, and what works beside them."""
    buffers = working = hashing = 0
    seen: dict[Any, float] = {}
    for job in jobs:
        entries = min(job.entries(block), job.models[0].size)
        wide = tree.wide_dtype(np.result_type(*[t.spec.dtype for t in job.models])).itemsize
        sizes = [t.spec.dtype.itemsize for _, t in job.inputs()]
        beside = wide if any(isinstance(t, Patched) for t in job.models) else 0
        rule = rules.get(job.rule)
        if rule is not None:
            sizes = [n if n == wide else n + wide for n in sizes]
            kind = job.rule, len(sizes), wide, repr(dict(job.options))
            if kind not in seen:
                seen[kind] = _working(job, rule, wide)
            working = max(working, int(entries * seen[kind]))
        buffers = max(buffers, entries * sum(sizes))
        working = max(working, 4 * entries * beside)  # a fold of rows
        hashing = max(hashing, min(HASHED, job.models[0].size) * job.spec.dtype.itemsize)
    patches = {t.patch for job in jobs for _, t in job.inputs() if isinstance(t, Patched)}
    each = buffers + max(working, hashing if digests or patches else 0)
    held = threads * each + _ranking(jobs, rules, block, threads) + sum(p.memory for p in patches)
    return held + SMALL


def _working(job: Job, rule: Rule, wide: int) -> float:
    """Return the bytes for each entry that a rule takes beside its arguments, seen on a few entries."""
    rng, few = np.random.default_rng(0), 1 << 14
    draw: Callable[[Any], np.ndarray] = lambda _: rng.random(few).astype(f"f{wide}")
    given = Block(
        name=job.name,
        models=[draw(t) for t in job.models],
        base=None if job.base is None else draw(job.base),
        beside={word: [draw(t) for t in ts] for word, ts in job.beside.items()},
        positions=np.arange(few, dtype=np.uint32) if rule.random else None,
    )
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    with np.errstate(all="ignore"):
        wanted = rule.ranks is not None or job.wants_sums(rule)
        measured = measure(rule, {job.name: given}, dict(job.options))[job.name] if wanted else ()
        rule.leaf(given._replace(measured=measured), **job.options)
    peak = tracemalloc.get_traced_memory()[1] - before
    if not traced:
        tracemalloc.stop()
    return peak / few + (4 if rule.random else 0)


def _ranking(jobs: Sequence[Job], rules: Mapping[str, Rule], block: int, threads: int) -> int:
    """Return the bytes of the samples and bins of those ranks that are sought at the same time."""
    sizes = []
    for group in measured_together(jobs, rules):
        first, entries = jobs[group[0]], [jobs[j].models[0].size for j in group]
        rule = rules[first.rule]
        pieces = sum(-(-n // jobs[j].entries(block)) for j, n in zip(group, entries, strict=True))
        if rule.counts is not None and pieces > 1:
            counts = rule.counts(sum(entries), **first.options)
            sample = sample_size(sum(entries), pieces) * pieces
            wide = tree.wide_dtype(first.spec.dtype).itemsize
            # First a sample's parts, the whole and a sorted copy; then what is kept, or bins of it.
            searches = sum(map(len, counts))
            held = KEPT * wide * (searches + 2) if sum(entries) < 64 * KEPT else 8 * BINS * (searches + 1)
            sizes.append(max(3 * sample * wide * len(counts), held))
    return sum(sorted(sizes)[-threads:])
