"""`topk`: the entries of largest score, under a budget and rules about names."""

import itertools
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.masks._largest import Piece, keys_of, largest, refuse_nan
from fishjax.masks._shards import global_largest, is_sharded, place
from fishjax.types import Mask, Params

Patterns = str | Sequence[str] | None
SCOPES = ("global", "layer", "leaf")


def topk(
    scores: Params,
    *,
    density: float | None = None,
    rank: int | None = None,
    scope: str = "global",
    minimum: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    always: Patterns = None,
) -> Mask:
    """Keep the largest scores.

    Args:
      scores: real `[*p]` for every leaf, without NaN; compared by value. Numpy (mapped files too) or
        jax, sharded too: each process then looks at its own shards, and masks are sharded alike.
      density: the fraction kept, in (0, 1]: exactly `round(density * n)` of the n included entries.
        Ties go to the leaf that is first in `jax.tree.leaves`, then to the lowest index.
      rank: instead of `density`: r (m + n) entries of each matrix `[m, n]`, as many numbers as LoRA of
        that rank has and what peft's SHiRA stores; of other leaves nothing, but `always`, not charged.
      scope: `"global"`, one budget for all; `"leaf"`, `round(density * size)` of each leaf; `"layer"`,
        of the leaves of each layer: those whose names agree up to the first number (`encoder.layer.3`),
        or have no number and lie beside each other.
      minimum: of each leaf at least its `minimum` largest, charged to the budget; with `"leaf"` on top
        where a leaf's own share is less.
      include, exclude: regexes of leaf names; everything is included by default.
      always: regexes of leaves that are kept whole and charged to the budget (a new head).

    Raises:
      UsageError: a density out of range, NaN scores, or a budget smaller than `always` or `minimum`.

    References: Sung et al. 2021, arXiv 2111.09839, section 3; r (m + n): SHiRA, arXiv 2406.13175.

    >>> import jax.numpy as jnp
    >>> topk({"w": jnp.array([3.0, 1.0, 2.0, 0.0])}, density=0.5)["w"]
    Array([ True, False,  True, False], dtype=bool)
    """
    kept = indices(
        scores,
        density=density,
        rank=rank,
        scope=scope,
        minimum=minimum,
        include=include,
        exclude=exclude,
        always=always,
    )
    return tree.map_named(lambda name, x: place(x, kept.get(name, np.zeros(0, np.int64))), scores)


def indices(
    scores: Params,
    *,
    density: float | None = None,
    rank: int | None = None,
    scope: str = "global",
    minimum: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    always: Patterns = None,
) -> dict[str, np.ndarray]:
    """Return where `topk` keeps, without ever making a mask: memory is a few times what is kept.

    Args: as of `topk`. Of numpy arrays and mapped files; needs no jax.

    Returns:
      By leaf name, flat positions in C order, int64 `[N]`, strictly increasing; leaves of which
      nothing is kept are absent.

    >>> indices({"w": np.array([3.0, 1.0, 2.0, 0.0])}, density=0.5)
    {'w': array([0, 2])}
    """
    if not (isinstance(minimum, numbers.Integral) and minimum >= 0):
        raise UsageError(f"`minimum` must be a whole number, at least 0; got {minimum!r}")
    leaves = tree.flatten(scores)
    budget = _budget(leaves, density, rank, scope, include, exclude, always)
    sharded = any(is_sharded(x) for x in leaves.values())
    arrays = leaves if sharded else {n: np.asarray(x) for n, x in leaves.items()}
    best = global_largest if sharded else _largest
    found = [_choose(arrays, group, minimum, scope, best) for group in budget.groups]
    keys = found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])
    if len(found) > 1 or minimum:
        keys.sort()
    ends = list(itertools.accumulate(x.size for x in leaves.values()))
    cuts = np.searchsorted(keys, ends)
    chosen = {}
    for name, start, a, b in zip(leaves, [0, *ends], [0, *cuts], cuts):
        if a < b:
            chosen[name] = keys[a:b]
            chosen[name] -= start  # in place: `keys` are nobody else's
    return {
        n: np.arange(x.size) if n in budget.whole else chosen[n]
        for n, x in leaves.items()
        if n in chosen or (n in budget.whole and x.size)
    }


class _Group(NamedTuple):
    """Leaves that share a budget."""

    names: list[str]
    keep: int  # entries


class _Budget(NamedTuple):
    groups: list[_Group]
    whole: set[str]  # leaves kept whole


def _largest(leaves: Mapping[str, np.ndarray], names: Sequence[str], count: int):
    keys_in = keys_of(leaves)
    pieces = [Piece(n, leaves[n].reshape(-1), keys_in[n]) for n in names]
    if count == sum(p.entries.size for p in pieces):
        refuse_nan(pieces)
        keys = [p.key(np.arange(p.entries.size)) for p in pieces]
        return np.concatenate([np.zeros(0, np.int64), *keys]), None
    return largest(pieces, count)


def _choose(leaves: Mapping[str, Any], group: _Group, minimum: int, scope: str, best) -> np.ndarray:
    """Return the keys of a group's largest entries, and of each leaf's `minimum` largest."""
    least = {n: min(minimum, leaves[n].size) for n in group.names}
    count = max(group.keep, sum(least.values())) if scope == "leaf" else group.keep
    if sum(least.values()) > count:
        raise UsageError(
            f"`minimum` {minimum} of each of {len(least)} leaves is more than their budget of {count}; "
            "lower it or raise the density"
        )
    keys, values = best(leaves, group.names, count)
    if not minimum or values is None:
        return keys
    # What each leaf is due is kept for certain; the rest of the budget goes to the best of the others.
    due = np.concatenate([best(leaves, [n], k)[0] for n, k in least.items()])
    others = ~np.isin(keys, due)
    room = count - due.size
    order = np.lexsort((keys[others], -_ordered(values[others])))[:room]
    return np.concatenate([due, keys[others][order]])


def _ordered(values: np.ndarray) -> np.ndarray:
    """Return numbers that may be negated, in the same order."""
    return values if values.dtype.kind == "f" else np.unique(values, return_inverse=True)[1]


def _budget(
    leaves: Mapping[str, Any],
    density: float | None,
    rank: int | None,
    scope: str,
    include: Patterns,
    exclude: Patterns,
    always: Patterns,
) -> _Budget:
    """Return which leaves share which budget, and which are kept whole."""
    if (density is None) == (rank is None):
        raise UsageError(f"give either `density` or `rank`; got {density} and {rank}")
    if density is not None and not (isinstance(density, numbers.Real) and 0 < density <= 1):  # nor NaN
        raise UsageError(f"`density` must lie in (0, 1]; got {density!r}")
    if rank is not None and not (isinstance(rank, numbers.Integral) and rank >= 1):
        raise UsageError(f"`rank` must be a whole number, at least 1; got {rank!r}")
    if scope not in SCOPES:
        raise UsageError(f"`scope` must be one of {', '.join(map(repr, SCOPES))}; got {scope!r}")
    whole = tree.select(always, leaves) if always else set()
    included = (tree.select(include, leaves) if include else set(leaves)) | whole
    included -= tree.select(exclude, leaves) - whole if exclude else set()
    rest = [n for n in leaves if n in included - whole]
    if density is None:
        sizes = {n: leaves[n].shape for n in rest if len(leaves[n].shape) == 2}
        if not sizes:
            raise UsageError("`rank` is for matrices [m, n]; none is among the included leaves")
        return _Budget([_Group([n], min(rank * (a + b), a * b)) for n, (a, b) in sizes.items()], whole)
    total, fixed = (sum(leaves[n].size for n in names) for names in (included, whole))
    budget = round(density * total)
    if budget < max(1, fixed):
        raise UsageError(
            f"`density` {density} of {total} entries is a budget of {budget}, "
            f"less than the {max(1, fixed)} that must be kept; raise the density"
        )
    if scope == "global":
        return _Budget([_Group(rest, budget - fixed)], whole)
    if whole:
        density = (budget - fixed) / (total - fixed) if total > fixed else 0.0
    key = (lambda name: name) if scope == "leaf" else _layer
    groups: dict[str, list[str]] = {}
    for name in rest:
        groups.setdefault(key(name), []).append(name)
    return _Budget(
        [_Group(g, round(density * sum(leaves[n].size for n in g))) for g in groups.values()], whole
    )


def _layer(name: str) -> str:
    """Return what leaves of one layer have in common: the name up to its first number, or its parent.

    >>> _layer("encoder.block.3.layer.0.wq"), _layer("layers_2.mlp.kernel"), _layer("pooler.bias")
    ('encoder.block.3', 'layers_2', 'pooler')
    """
    found = re.match(r"(?:.*?[._])?\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0] or name
