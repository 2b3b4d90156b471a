"""What a merge would come to, before it is made: where contributions clash, and what each would lose."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.checkpoint._dtypes import Spec
from fishjax.errors import StructureError, UsageError
from fishjax.merge._blocks import Buffers, Readable
from fishjax.merge._files import check_inputs
from fishjax.merge._plan import open_tensors
from fishjax.merge._rule import check_weights, is_inexact
from fishjax.merge._statistics import GRAIN
from fishjax.merge._trees import Keep, kept_leaves
from fishjax.merge._unpack import is_patch, open_patch
from fishjax.types import Array, Fisher, Params

_LAYER = re.compile(r"^(.*?\.\d+)\.")


class Clash(NamedTuple):
    """How contributions meet in some entries of the model."""

    entries: int
    changed: list[int]  # entries that each contribution changes
    shared: int  # entries that more than one changes
    opposed: int  # of these, entries that they change in opposite directions
    increase: list[float] | None  # what each would lose: 1/2 sum F_i (merged - theta_i)^2, nats
    overlap: float | None  # of the two Fishers that overlap most, sum sqrt(F G) / sqrt(sum F sum G), [0, 1]


class Conflicts(NamedTuple):
    """Where contributions clash, layer by layer and in all."""

    layers: dict[str, Clash]
    total: Clash
    skipped: dict[str, str]  # leaves that are not merged, and why


def explain(
    base: Params,
    models: Sequence[Params],
    *,
    fishers: Sequence[Fisher] | None = None,
    weights: Any = None,
    keep: Keep | None = None,
) -> Conflicts:
    """Say where models that came from one base clash, and what a merge would cost each of them.

    Args:
      base: the tree that they started from, concrete leaves.
      models: trees; one may lack leaves that it does not change (as patches do).
      fishers: one diagonal Fisher a model, for what each would lose; then the merge that is looked at
        is that by Fisher (floor 1e-6), else no loss is predicted. A diagonal sees no correlations:
        take it as an order, not as a measurement.
      weights: of the merge, one a model, 1 each by default.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, as in `average`; they
        are not counted but named, and their shapes need not agree (a head, a grown vocabulary).

    Returns:
      Counts for each layer (what its leaves have in common up to the first number), and in all.

    Raises:
      StructureError: a leaf's shape, or that of its Fisher, is not that of the base.
      UsageError: wrong numbers of Fishers or weights; a Fisher that is negative or not finite; a rule of
        `keep` that matches nothing.

    >>> import numpy as np
    >>> base = {"w": np.zeros(4)}
    >>> found = explain(base, [{"w": np.array([1.0, 1, 0, 0])}, {"w": np.array([0, -1.0, 1, 0])}])
    >>> found.total.changed, found.total.shared, found.total.opposed
    ([2, 2], 1, 1)
    """
    numbers = _check(len(models), fishers, weights)
    held = lambda params: {n: Held(x) for n, x in tree.flatten(params).items()}
    known = None if fishers is None else [held(f) for f in fishers]
    return _conflicts(held(base), [held(m) for m in models], known, numbers, keep)


def explain_files(
    base: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    *,
    fishers: Sequence[str | os.PathLike] | None = None,
    weights: Any = None,
    keep: Keep | None = None,
) -> Conflicts:
    """Do what `explain` does for files: models, or patches for the base, a block at a time. Needs no jax.

    Raises:
      StructureError: as in `explain`.
      FileFormatError: a file is corrupt, or of another kind.
      WrongBaseError: a patch is for another base.
    """
    numbers = _check(len(inputs), fishers, weights)
    with ExitStack() as stack:
        origin = open_tensors(stack, base)
        tuned: list[Mapping[str, Readable]] = [
            open_patch(path, origin) if is_patch(path) else open_tensors(stack, path) for path in inputs
        ]
        known = None if fishers is None else [open_tensors(stack, path, "fisher") for path in fishers]
        check_inputs([t for tensors in [*tuned, *(known or [])] for t in tensors.values()], map)
        return _conflicts(origin, tuned, known, numbers, keep)


def table(found: Conflicts, names: Sequence[str]) -> str:
    """Return conflicts as text, a layer a line; `names` are the contributors'."""
    width = max(map(len, [*found.layers, "in all"]))
    head = f"{'':{width}}  {'entries':>12}  " + "  ".join(f"{n[-12:]:>12}" for n in names)
    head += f"  {'shared':>12}  {'opposed':>12}"
    if found.total.increase is not None:
        head += "  " + "  ".join(f"{'loss ' + n[-7:]:>12}" for n in names) + f"  {'overlap':>8}"
    lines = [head]
    for layer, clash in [*found.layers.items(), ("in all", found.total)]:
        line = f"{layer:{width}}  {clash.entries:>12}  " + "  ".join(f"{c:>12}" for c in clash.changed)
        line += f"  {clash.shared:>12}  {clash.opposed:>12}"
        if clash.increase is not None:
            line += "  " + "  ".join(f"{x:>12.4g}" for x in clash.increase)
            line += f"  {clash.overlap if clash.overlap is not None else float('nan'):>8.3f}"
        lines.append(line)
    return "\n".join(lines + [f"not merged: `{n}` ({why})" for n, why in found.skipped.items()])


class Held(NamedTuple):
    """A leaf in memory, read like one in a file."""

    array: Array

    @property
    def spec(self) -> Spec:
        return Spec(np.dtype(self.array.dtype), tuple(self.array.shape))

    @property
    def size(self) -> int:
        return math.prod(self.array.shape)

    def fill(self, data: np.ndarray, start: int) -> None:
        data[:] = np.asarray(self.array).reshape(-1)[start : start + data.size]

    def identity(self) -> list[Any]:
        return [id(self.array)]


def _check(n: int, fishers: Sequence[Any] | None, weights: Any) -> list[float]:
    if fishers is not None and len(fishers) != n:
        raise UsageError(f"`fishers` must be one for each of the {n} models; got {len(fishers)}")
    return check_weights(weights, n)


def _conflicts(
    base: Mapping[str, Readable],
    tuned: Sequence[Mapping[str, Readable]],
    fishers: Sequence[Mapping[str, Readable]] | None,
    weights: Sequence[float],
    keep: Keep | None,
) -> Conflicts:
    kept = kept_leaves(tuned, keep)
    layers: dict[str, list[_Sums]] = {}
    skipped: dict[str, str] = {}
    buffers = Buffers()
    for name in sorted({*base, *(n for m in tuned for n in m)}):
        if name in kept:
            skipped[name] = f"kept from model {kept[name]}"
            continue
        if name not in base:
            skipped[name] = f"only in model {next(i for i, m in enumerate(tuned) if name in m)}"
            continue
        if not is_inexact(base[name].spec.dtype):
            skipped[name] = f"{base[name].spec.dtype}"
            continue
        for i, m in enumerate(tuned):
            if name in m and m[name].spec.shape != base[name].spec.shape:
                raise StructureError(
                    f"`{name}` is {tree.describe(base[name].spec)} in the base "
                    f"and {tree.describe(m[name].spec)} in model {i}; take it from one model by `keep`"
                )
        lacking = [i for i, f in enumerate(fishers or []) if name not in f]
        if lacking:
            skipped[name] = f"no Fisher in model {lacking[0]}"
            continue
        for i, f in enumerate(fishers or []):
            if f[name].spec.shape != base[name].spec.shape:
                raise StructureError(
                    f"`{name}` is {tree.describe(base[name].spec)} in the base "
                    f"and {tree.describe(f[name].spec)} in the Fisher of model {i}"
                )
        layer = found[1] if (found := _LAYER.match(name)) else name
        beside = [f[name] for f in fishers or []]
        sums = _sums(name, base[name], [m.get(name) for m in tuned], beside, weights, buffers)
        layers.setdefault(layer, []).append(sums)
    clashes = {layer: _clash(sums, len(tuned), fishers is not None) for layer, sums in layers.items()}
    total = _clash((s for sums in layers.values() for s in sums), len(tuned), fishers is not None)
    return Conflicts(clashes, total, skipped)


class _Sums(NamedTuple):
    counts: np.ndarray  # [3 + n]: entries, shared, opposed, changed by each
    increase: np.ndarray  # [n]
    overlap: np.ndarray  # [n, n]: sum sqrt(F_i F_j)


def _sums(
    name: str,
    base: Readable,
    tuned: Sequence[Readable | None],
    fishers: Sequence[Readable],
    weights: Sequence[float],
    buffers: Buffers,
) -> _Sums:
    """Return a leaf's sums, taken block by block; a model that lacks it changes nothing."""
    n = len(tuned)
    total = _Sums(np.zeros(3 + n, np.int64), np.zeros(n), np.zeros((n, n)))
    for start in range(0, base.size, GRAIN):
        stop = min(start + GRAIN, base.size)
        read: Callable[[Readable], np.ndarray] = partial(_wide, buffers, start, stop)
        origin = read(base)
        steps = [read(m) - origin if m is not None else np.zeros_like(origin) for m in tuned]
        known = [read(f) for f in fishers]
        for i, f in enumerate(known):
            if not (np.isfinite(f) & (f >= 0)).all():
                raise UsageError(
                    f"`fishers` (number {i}) must be finite and >= 0; `{name}` is not everywhere"
                )
        total = _Sums(*(a + b for a, b in zip(total, _block_sums(steps, known, weights), strict=True)))
    return total


def _wide(buffers: Buffers, start: int, stop: int, leaf: Readable) -> np.ndarray:
    return buffers.read("raw", leaf, start, stop).astype(np.float64)


def _block_sums(
    steps: Sequence[np.ndarray], fishers: Sequence[np.ndarray], weights: Sequence[float]
) -> _Sums:
    n = len(steps)
    ups, downs = sum((s > 0).astype(np.int64) for s in steps), sum((s < 0).astype(np.int64) for s in steps)
    opposed = np.count_nonzero((ups > 0) & (downs > 0))
    changed = [np.count_nonzero(s) for s in steps]
    counts = np.array([steps[0].size, np.count_nonzero(ups + downs > 1), opposed, *changed], np.int64)
    if not fishers:
        return _Sums(counts, np.zeros(n), np.zeros((n, n)))
    masses = [w * np.maximum(f, 1e-6) for w, f in zip(weights, fishers, strict=True)]
    merged = sum(m * s for m, s in zip(masses, steps, strict=True)) / sum(masses)
    increase = np.array([0.5 * (f * (merged - s) ** 2).sum() for f, s in zip(fishers, steps, strict=True)])
    roots = [np.sqrt(f) for f in fishers]
    return _Sums(counts, increase, np.array([[(a * b).sum() for b in roots] for a in roots]))


def _clash(sums: Iterable[_Sums], n: int, with_fishers: bool) -> Clash:
    gathered = list(sums)
    counts = sum((s.counts for s in gathered), np.zeros(3 + n, np.int64)).tolist()
    if not with_fishers:
        return Clash(counts[0], counts[3:], counts[1], counts[2], None, None)
    increase = sum((s.increase for s in gathered), np.zeros(n)).tolist()
    both = sum((s.overlap for s in gathered), np.zeros((n, n)))
    first, second = np.triu_indices(n, 1)
    mass = np.sqrt(both[first, first] * both[second, second])
    overlaps = both[first, second][mass > 0] / mass[mass > 0]
    overlap = float(overlaps.max()) if overlaps.size else None
    return Clash(counts[0], counts[3:], counts[1], counts[2], increase, overlap)
