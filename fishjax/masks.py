"""Masks: which entries of the parameters are kept, as a bool for each.

`topk` of a Fisher is the FISH mask (Sung et al. 2021, arXiv 2111.09839); `random`, `magnitude` and
`by_name` are its baselines, and `gate` trains dense parameters under a mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.types import Array, Mask, Params

Patterns = str | Sequence[str] | None


def topk(
    scores: Params,
    *,
    density: float,
    scope: str = "global",
    include: Patterns = None,
    exclude: Patterns = None,
    always: Patterns = None,
) -> Mask:
    """Keep the largest scores.

    Args:
      scores: real `[*p]` for every leaf, without NaN; compared by value.
      density: the fraction kept, in (0, 1]: exactly `round(density * n)` of the n included entries.
        Ties go to the leaf that is first in `jax.tree.leaves`, then to the lowest index.
      scope: `"global"`, one budget for all; `"leaf"`, `round(density * size)` of each leaf.
      include, exclude: regexes of leaf names; everything is included by default.
      always: regexes of leaves that are kept whole and charged to the budget (a new head).

    Raises:
      UsageError: a density out of range, NaN scores, or a budget smaller than `always`.

    References: Sung et al. 2021, arXiv 2111.09839, section 3.

    >>> topk({"w": jnp.array([3.0, 1.0, 2.0, 0.0])}, density=0.5)["w"]
    Array([ True, False,  True, False], dtype=bool)
    """
    flat = {n: np.asarray(x) for n, x in tree.flatten(scores).items()}
    open_, whole, density = _budget(flat, density, include, exclude, always)
    if scope not in ("global", "leaf"):
        raise UsageError(f'`scope` must be "global" or "leaf"; got {scope!r}')
    groups = [[n] for n in open_] if scope == "leaf" else [list(open_)]
    kept = {n: np.full(x.shape, n in whole) for n, x in flat.items()}
    for group in groups:
        count = round(density * sum(flat[n].size for n in group))
        kept |= _largest({n: flat[n] for n in group}, count)
    return tree.rebuild(scores, {n: jnp.asarray(m) for n, m in kept.items()})


def random(key: Array, params: Params, *, density: float, **rules) -> Mask:
    """Keep entries drawn uniformly; `rules` as in `topk`.

    >>> int(random(jax.random.key(0), {"w": jnp.ones(100)}, density=0.1)["w"].sum())
    10
    """
    flat = tree.flatten(params)
    keys = dict(zip(flat, jax.random.split(key, max(1, len(flat)))))
    bits = {n: jax.random.bits(keys[n], x.shape, jnp.uint32) for n, x in flat.items()}
    return topk(tree.rebuild(params, bits), density=density, **rules)


def magnitude(params: Params, *, density: float, **rules) -> Mask:
    """Keep the entries of largest absolute value; `rules` as in `topk`.

    >>> magnitude({"w": jnp.array([-3.0, 1.0])}, density=0.5)["w"]
    Array([ True, False], dtype=bool)
    """
    return topk(jax.tree.map(jnp.abs, params), density=density, **rules)


def by_name(params: Params, patterns: str | Sequence[str]) -> Mask:
    """Keep whole leaves by regexes of their names (`"bias$"` is BitFit, arXiv 2106.10199).

    >>> by_name({"bias": jnp.ones(2), "kernel": jnp.ones(2)}, "bias")["bias"]
    Array([ True,  True], dtype=bool)
    """
    chosen = tree.select(patterns, tree.names(params))
    return tree.map_named(lambda n, x: jnp.full(x.shape, n in chosen), params)


def union(first: Mask, *rest: Mask) -> Mask:
    """Keep what any mask keeps."""
    return _fold(jnp.logical_or, first, rest)


def intersection(first: Mask, *rest: Mask) -> Mask:
    """Keep what all masks keep."""
    return _fold(jnp.logical_and, first, rest)


def overlap(a: Mask, b: Mask) -> float:
    """Return the Jaccard index of two masks: kept by both over kept by either; 0 if both are empty.

    >>> overlap({"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, False])})
    0.5
    """
    either = count(union(a, b))
    return count(intersection(a, b)) / either if either else 0.0


def split(scores: Params, parts: int, *, density: float, **rules) -> list[Mask]:
    """Share out the largest scores to disjoint masks of equal strength, dealt by rank.

    Each mask has `density` of the entries, to within one; mask i gets ranks i, i + parts, ...

    Args:
      scores: as in `topk`.
      parts: how many masks.
      density: of each mask, at most `1 / parts`.
      **rules: as in `topk`.

    References: the distributed setting of Sung et al. 2021, arXiv 2111.09839, section 4.2.

    >>> a, b = split({"w": jnp.array([4.0, 3.0, 2.0, 1.0])}, 2, density=0.5)
    >>> a["w"], b["w"]
    (Array([ True, False,  True, False], dtype=bool), Array([False,  True, False,  True], dtype=bool))
    """
    if parts < 1 or density * parts > 1:
        raise UsageError(f"`density` must be at most 1/{parts} for {parts} disjoint masks; got {density}")
    both = tree.flatten(topk(scores, density=density * parts, **rules))
    flat = tree.flatten(scores)
    kept = {n: np.flatnonzero(np.asarray(both[n])) for n in flat}
    values = np.concatenate([np.asarray(flat[n]).reshape(-1)[i] for n, i in kept.items()])
    rank = np.empty(len(values), int)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    shares = np.split(rank % parts, np.cumsum([len(i) for i in kept.values()])[:-1])
    masks = []
    for part in range(parts):
        leaves = {n: np.zeros(x.shape, bool) for n, x in flat.items()}
        for (name, where), share in zip(kept.items(), shares):
            leaves[name].reshape(-1)[where[share == part]] = True
        masks.append(tree.rebuild(scores, {n: jnp.asarray(m) for n, m in leaves.items()}))
    return masks


def count(mask: Mask) -> int:
    """Return how many entries a mask keeps."""
    return sum(int(np.count_nonzero(m)) for m in tree.flatten(mask).values())


def density(mask: Mask) -> float:
    """Return the fraction of entries that a mask keeps.

    >>> density({"w": jnp.array([True, False, False, False])})
    0.25
    """
    return count(mask) / max(1, sum(m.size for m in tree.flatten(mask).values()))


class GateState(NamedTuple):
    """The mask, carried as state: an argument of the compiled step, not a constant within it."""

    mask: Mask


def gate(mask: Mask) -> optax.GradientTransformation:
    """Let updates pass only where a mask keeps; must be the last of a chain.

    Anything before it (weight decay, momentum) may move entries that the mask freezes; after it nothing
    may. A frozen entry gets the update -0.0, the one number that leaves every bit of it alone.

    >>> tx = optax.chain(optax.sgd(0.5), gate({"w": jnp.array([True, False])}))
    >>> params = {"w": jnp.array([1.0, -0.0])}
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([ 0.5, -0. ], dtype=float32)
    """

    def init(params):
        tree.check_same(params, mask, ("params", "mask"), dtypes=False)
        return GateState(jax.tree.map(lambda m: jnp.array(m, bool), mask))

    def update(updates, state, params=None):
        del params
        gated = jax.tree.map(lambda m, u: jnp.where(m, u, jnp.array(-0.0, u.dtype)), state.mask, updates)
        return gated, state

    return optax.GradientTransformation(init, update)


def _budget(flat, density, include, exclude, always):
    """Return the names that compete, those kept whole, and the density left for the former."""
    if not 0 < density <= 1:  # also refuses NaN
        raise UsageError(f"`density` must lie in (0, 1]; got {density}")
    whole = tree.select(always, flat) if always else set()
    included = (tree.select(include, flat) if include else set(flat)) | whole
    included -= tree.select(exclude, flat) - whole if exclude else set()
    odd = [n for n in flat if n in included - whole and _has_nan(flat[n])]
    if odd:
        raise UsageError(f"`scores` must not be NaN; `{odd[0]}` has NaN (compute the scores again)")
    total, fixed = (sum(flat[n].size for n in names) for names in (included, whole))
    budget = round(density * total)
    if budget < max(1, fixed):
        raise UsageError(
            f"`density` {density} of {total} entries is a budget of {budget}, "
            f"less than the {max(1, fixed)} that must be kept; raise the density"
        )
    rest = (budget - fixed) / (total - fixed) if total > fixed else 0.0
    return [n for n in flat if n in included - whole], whole, rest if whole else density


def _has_nan(x: np.ndarray) -> bool:
    return tree.is_inexact(x) and bool(np.isnan(x).any())


def _largest(flat: dict[str, np.ndarray], keep: int) -> dict[str, np.ndarray]:
    """Return masks of exactly `keep` entries: all above the threshold, then ties in order."""
    total = sum(x.size for x in flat.values())
    if keep in (0, total):
        return {n: np.full(x.shape, keep > 0) for n, x in flat.items()}
    scores = np.concatenate([x.reshape(-1) for x in flat.values()])
    threshold = np.partition(scores, total - keep)[total - keep]
    masks = {n: x > threshold for n, x in flat.items()}
    ties = keep - sum(int(m.sum()) for m in masks.values())
    for name, x in flat.items():
        where = np.flatnonzero(x == threshold)[:ties]
        masks[name].reshape(-1)[where] = True
        ties -= len(where)
    return masks


def _fold(op, first: Mask, rest: Sequence[Mask]) -> Mask:
    for mask in rest:
        tree.check_same(first, mask, ("the first mask", "another"))
        first = jax.tree.map(op, first, mask)
    return first
