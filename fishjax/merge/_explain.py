"""What a merge would come to, before it is made: where contributions clash, and what each would lose."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._rule import check_weights, is_inexact
from fishjax.merge._trees import Keep, kept_leaves
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
    flat, n = tree.flatten(base), len(models)
    numbers = check_weights(weights, n)
    if fishers is not None and len(fishers) != n:
        raise UsageError(f"`fishers` must be one for each of the {n} models; got {len(fishers)}")
    tuned = [tree.flatten(m) for m in models]
    known = [tree.flatten(f) for f in fishers] if fishers is not None else None
    return _conflicts(flat, tuned, known, numbers, keep)


def explain_files(
    base: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    *,
    fishers: Sequence[str | os.PathLike] | None = None,
    weights: Any = None,
    keep: Keep | None = None,
) -> Conflicts:
    """Do what `explain` does for files: models, or patches for the base. Needs no jax.

    Raises:
      StructureError: as in `explain`.
      WrongBaseError: a patch is for another base.
    """
    from contextlib import ExitStack

    from fishjax.checkpoint import open_params

    with ExitStack() as stack:
        origin = stack.enter_context(open_params(base))
        tuned = [_open(stack, path, origin) for path in inputs]
        if fishers is not None and len(fishers) != len(inputs):
            raise UsageError(
                f"`fishers` must be one for each of the {len(inputs)} models; got {len(fishers)}"
            )
        known = [stack.enter_context(open_params(f)) for f in fishers] if fishers is not None else None
        return _conflicts(origin, tuned, known, check_weights(weights, len(inputs)), keep)


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


def _open(stack: Any, path: str | os.PathLike, base: Mapping[str, Array]) -> Mapping[str, Array]:
    """Open a model, or fold a patch into the leaves that it changes."""
    from fishjax.checkpoint import open_params
    from fishjax.merge._unpack import fold_patch, is_patch

    return fold_patch(path, base) if is_patch(path) else stack.enter_context(open_params(path))


def _conflicts(
    base: Mapping[str, Array],
    tuned: Sequence[Mapping[str, Array]],
    fishers: Sequence[Mapping[str, Array]] | None,
    weights: Sequence[float],
    keep: Keep | None,
) -> Conflicts:
    kept = kept_leaves(tuned, keep)
    layers: dict[str, list[_Sums]] = {}
    skipped: dict[str, str] = {}
    for name in sorted({*base, *(n for m in tuned for n in m)}):
        if name in kept:
            skipped[name] = f"kept from model {kept[name]}"
            continue
        if name not in base:
            skipped[name] = f"only in model {next(i for i, m in enumerate(tuned) if name in m)}"
            continue
        if not is_inexact(base[name].dtype):
            skipped[name] = f"{base[name].dtype}"
            continue
        for i, m in enumerate(tuned):
            if name in m and tuple(m[name].shape) != tuple(base[name].shape):
                raise StructureError(
                    f"`{name}` is {tree.describe(base[name])} in the base "
                    f"and {tree.describe(m[name])} in model {i}; take it from one model by `keep`"
                )
        lacking = [i for i, f in enumerate(fishers or []) if name not in f]
        if lacking:
            skipped[name] = f"no Fisher in model {lacking[0]}"
            continue
        for i, f in enumerate(fishers or []):
            if tuple(f[name].shape) != tuple(base[name].shape):
                raise StructureError(
                    f"`{name}` is {tree.describe(base[name])} in the base "
                    f"and {tree.describe(f[name])} in the Fisher of model {i}"
                )
        layer = found[1] if (found := _LAYER.match(name)) else name
        layers.setdefault(layer, []).append(_sums(name, base, tuned, fishers, weights))
    clashes = {layer: _clash(sums, len(tuned), fishers is not None) for layer, sums in layers.items()}
    total = _clash((s for sums in layers.values() for s in sums), len(tuned), fishers is not None)
    return Conflicts(clashes, total, skipped)


class _Sums(NamedTuple):
    counts: np.ndarray  # [3 + n]: entries, shared, opposed, changed by each
    increase: np.ndarray  # [n]
    overlap: np.ndarray  # [n, n]: sum sqrt(F_i F_j)


def _sums(name: str, base: Any, tuned: Any, fishers: Any, weights: Sequence[float]) -> _Sums:
    get: Callable[[Any], np.ndarray] = lambda x: np.asarray(x).astype(np.float64).reshape(-1)
    origin = get(base[name])
    steps = [get(m[name]) - origin if name in m else np.zeros_like(origin) for m in tuned]
    ups, downs = sum((s > 0).astype(np.int64) for s in steps), sum((s < 0).astype(np.int64) for s in steps)
    changed = [np.count_nonzero(s) for s in steps]
    counts = [
        origin.size,
        np.count_nonzero(ups + downs > 1),
        np.count_nonzero((ups > 0) & (downs > 0)),
        *changed,
    ]
    increase, overlap = np.zeros(len(tuned)), np.zeros((len(tuned), len(tuned)))
    if fishers is not None:
        known = [get(f[name]) for f in fishers]
        for i, f in enumerate(known):
            if not (np.isfinite(f) & (f >= 0)).all():
                raise UsageError(
                    f"`fishers` (number {i}) must be finite and >= 0; `{name}` is not everywhere"
                )
        masses = [w * np.maximum(f, 1e-6) for w, f in zip(weights, known, strict=True)]
        merged = sum(m * s for m, s in zip(masses, steps, strict=True)) / sum(masses)
        increase = np.array([0.5 * (f * (merged - s) ** 2).sum() for f, s in zip(known, steps, strict=True)])
        roots = [np.sqrt(f) for f in known]
        overlap = np.array([[(a * b).sum() for b in roots] for a in roots])
    return _Sums(np.array(counts, np.int64), increase, overlap)


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
