"""Masks beside each other: union, intersection, overlap, disjoint shares, and masks of positions."""

from collections.abc import Mapping, Sequence

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.masks._shards import place
from fishjax.masks._topk import indices
from fishjax.types import Array, Mask, Params


def union(first: Mask, *rest: Mask) -> Mask:
    """Keep what any mask keeps."""
    import jax.numpy as jnp

    return _fold(jnp.logical_or, first, rest)


def intersection(first: Mask, *rest: Mask) -> Mask:
    """Keep what all masks keep."""
    import jax.numpy as jnp

    return _fold(jnp.logical_and, first, rest)


def overlap(a: Mask, b: Mask) -> float:
    """Return the Jaccard index of two masks: kept by both over kept by either; 0 if both are empty.

    >>> import jax.numpy as jnp
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

    >>> import jax.numpy as jnp
    >>> a, b = split({"w": jnp.array([4.0, 3.0, 2.0, 1.0])}, 2, density=0.5)
    >>> a["w"], b["w"]
    (Array([ True, False,  True, False], dtype=bool), Array([False,  True, False,  True], dtype=bool))
    """
    if parts < 1 or density * parts > 1:
        raise UsageError(f"`density` must be at most 1/{parts} for {parts} disjoint masks; got {density}")
    flat = tree.flatten(scores)
    kept = indices(scores, density=density * parts, **rules)
    values = np.concatenate([np.asarray(flat[n]).reshape(-1)[i] for n, i in kept.items()])
    rank = np.empty(len(values), int)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    shares = np.split(rank % parts, np.cumsum([len(i) for i in kept.values()])[:-1])
    masks = []
    for part in range(parts):
        mine = {name: where[share == part] for (name, where), share in zip(kept.items(), shares)}
        masks.append(from_indices(scores, mine))
    return masks


def count(mask: Mask) -> int:
    """Return how many entries a mask keeps."""
    return sum(int(np.count_nonzero(m)) for m in tree.flatten(mask).values())


def density(mask: Mask) -> float:
    """Return the fraction of entries that a mask keeps.

    >>> import jax.numpy as jnp
    >>> density({"w": jnp.array([True, False, False, False])})
    0.25
    """
    return count(mask) / max(1, sum(m.size for m in tree.flatten(mask).values()))


def from_indices(params: Params, kept: Mapping[str, Array]) -> Mask:
    """Return the mask that keeps flat positions by leaf name, as of `indices`.

    Args:
      params: any tree of the mask's structure and shapes.
      kept: int `[N]` in C order, strictly increasing.

    Raises:
      StructureError: a name that is no leaf; positions that are not increasing or not in the leaf.

    >>> import jax.numpy as jnp
    >>> from_indices({"w": jnp.zeros(3)}, {"w": np.array([0, 2])})["w"]
    Array([ True, False,  True], dtype=bool)
    """
    leaves = tree.flatten(params)
    for name, where in kept.items():
        if name not in leaves:
            raise StructureError(f"`{name}` is kept in part, and is no leaf of the tree")
        where = np.asarray(where)
        if where.ndim != 1 or where.dtype.kind not in "iu" or (where[1:] <= where[:-1]).any():
            raise StructureError(f"positions in `{name}` must be strictly increasing integers [N]")
        if where.size and (where[0] < 0 or where[-1] >= leaves[name].size):
            raise StructureError(
                f"positions in `{name}` reach from {where[0]} to {where[-1]}, "
                f"the leaf has {leaves[name].size} entries"
            )
    nothing = np.zeros(0, np.int64)
    return tree.map_named(lambda n, x: place(x, np.asarray(kept.get(n, nothing))), params)


def _fold(op, first: Mask, rest: Sequence[Mask]) -> Mask:
    import jax

    for mask in rest:
        tree.check_same(first, mask, ("the first mask", "another"))
        first = jax.tree.map(op, first, mask)
    return first
