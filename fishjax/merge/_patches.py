"""Merging patches as patches: small stays small, and what is exact stays exact."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.merge._rule import add_up, check_weights, choice, whole_number
from fishjax.types import Array, Params, Patch


def patches(
    params: Params,
    contributions: Sequence[Patch],
    *,
    weights: Any = None,
    scales: str = "deviations",
    rank: int | None = None,
) -> Patch:
    """Return one patch that does what several do together: the weighted sum of their changes.

    Leaf by leaf: sparse entries meet in the union of their positions; low-rank products are added
    exactly, by concatenation; vectors of (IA)^3 add as `scales` says; where kinds differ the leaf
    becomes dense. A leaf that only one patch changes is changed by its weight times that.

    Args:
      params: the base of all patches.
      contributions: patches, each `{leaf name: kind}`, with concrete indices.
      weights: one finite number a patch, 1 each by default; 1/n each gives the mean.
      scales: "deviations" adds what vectors deviate from one, "logs" multiplies their powers
        (vectors > 0).
      rank: compress each low-rank sum to this rank: the nearest in Frobenius norm, by SVD.

    Raises:
      StructureError: a patch does not fit the base.
      UsageError: wrong weights; `scales` "logs" with a vector that is not positive.

    >>> import numpy as np
    >>> from fishjax.patches import Sparse
    >>> p = {"w": Sparse(np.array([0, 2]), np.float32([1, 2]))}
    >>> q = {"w": Sparse(np.array([2, 3]), np.float32([4, 8]))}
    >>> merged = patches({"w": np.zeros(4, np.float32)}, [p, q], weights=[1, 0.5])["w"]
    >>> merged.indices.tolist(), merged.values.tolist()
    ([0, 2, 3], [1.0, 4.0, 4.0])
    """
    from fishjax.patches import LowRank, Scale, Sparse, check, touched

    if not contributions:
        raise UsageError("`contributions` must hold at least one patch; got none")
    numbers = check_weights(weights, len(contributions), zero_sum=True)
    choice("scales", scales, ("deviations", "logs"))
    if rank is not None and whole_number("rank", rank) < 1:
        raise UsageError(f"`rank` must be at least 1; got {rank}")
    leaves = tree.flatten(params)
    for patch in contributions:
        check(params, patch)
    owned: dict[str, set[str]] = {}  # by entry, what it changes in any patch
    owners: dict[str, set[str]] = {}  # by leaf, the entries that change it
    for name, leaf in [(n, t) for p in contributions for n, k in p.items() for t in touched({n: k})]:
        owned.setdefault(name, set()).add(leaf)
        owners.setdefault(leaf, set()).add(name)
    merged: dict[str, Any] = {}
    for name, changed in sorted(owned.items()):
        parts = [
            (w, _as_sparse(p[name], name, leaves))
            for w, p in zip(numbers, contributions, strict=True)
            if name in p
        ]
        alone = all(owners[leaf] == {name} for leaf in changed)
        kinds = {type(k) for _, k in parts}
        if alone and kinds == {Sparse}:
            merged[name] = _sparse(leaves[name], parts)
        elif alone and kinds == {LowRank} and len({_axes(k) for _, k in parts}) == 1:
            merged[name] = _low_rank(parts, rank)
        elif alone and kinds == {Scale} and len({(k.vector.shape, k.tied, k.fused) for _, k in parts}) == 1:
            merged[name] = _scale(parts, scales)
        else:
            merged |= {leaf: _dense(leaf, leaves, contributions, numbers) for leaf in changed}
    return merged


def _as_sparse(kind: Any, name: str, leaves: Mapping[str, Array]) -> Any:
    """Return a delta of some entries as the sparse kind that it amounts to, else the kind as it is."""
    from fishjax.patches import Delta, Sparse

    if not isinstance(kind, Delta) or kind.indices is None:
        return kind
    wide = tree.wide_dtype(leaves[name].dtype)
    indices = np.asarray(kind.indices)
    scales = np.repeat(np.asarray(kind.scales).astype(wide), kind.block)[: indices.size]
    base = np.asarray(leaves[name]).reshape(-1)[indices].astype(wide)
    return Sparse(indices, base + np.asarray(kind.codes).astype(wide) * scales)


def _sparse(leaf: Array, parts: Sequence[tuple[Any, Any]]) -> Any:
    from fishjax.patches import Sparse

    indices = np.unique(np.concatenate([np.asarray(k.indices, np.int64) for _, k in parts]))
    wide = tree.wide_dtype(leaf.dtype)
    base = np.asarray(leaf).reshape(-1)[indices].astype(wide)
    total = np.zeros(indices.size, wide)
    for w, kind in parts:
        places = np.searchsorted(indices, np.asarray(kind.indices, np.int64))
        total[places] += wide.type(w) * (np.asarray(kind.values).astype(wide) - base[places])
    small = np.int32 if leaf.size <= np.iinfo(np.int32).max else np.int64
    return Sparse(indices.astype(small), (base + total).astype(leaf.dtype))


def _axes(kind: Any) -> tuple[bool, ...]:
    """Return which axes a low-rank patch's first factor spans."""
    return tuple(n != 1 for n in kind.a.shape[:-1])


def _low_rank(parts: Sequence[tuple[Any, Any]], rank: int | None) -> Any:
    import jax.numpy as jnp

    from fishjax.patches import LowRank

    a = jnp.concatenate([k.a for _, k in parts], axis=-1)
    b = jnp.concatenate([k.b * jnp.asarray(w * k.scale, k.b.dtype) for w, k in parts], axis=-1)
    if rank is None or rank >= a.shape[-1]:
        return LowRank(a, b, 1.0)
    # The SVD of a product of thin factors, through the small middle of their QR decompositions.
    q_a, r_a = np.linalg.qr(np.asarray(a, np.float64).reshape(-1, a.shape[-1]))
    q_b, r_b = np.linalg.qr(np.asarray(b, np.float64).reshape(-1, b.shape[-1]))
    left, sizes, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    root = np.sqrt(sizes[:rank])
    new_a, new_b = q_a @ (left[:, :rank] * root), q_b @ (right[:rank].T * root)
    shape = lambda x: (*x.shape[:-1], min(rank, root.size))
    return LowRank(
        jnp.asarray(new_a.reshape(shape(a)), a.dtype), jnp.asarray(new_b.reshape(shape(b)), b.dtype), 1.0
    )


def _scale(parts: Sequence[tuple[Any, Any]], scales: str) -> Any:
    from fishjax.patches import Scale

    first = parts[0][1]
    vectors = [np.asarray(k.vector, np.float64) for _, k in parts]
    if scales == "logs":
        if any((v <= 0).any() for v in vectors):
            raise UsageError('`scales="logs"` needs vectors > 0; use "deviations"')
        total = np.exp(add_up([w * np.log(v) for (w, _), v in zip(parts, vectors, strict=True)]))
    else:
        total = 1 + add_up([w * (v - 1) for (w, _), v in zip(parts, vectors, strict=True)])
    return Scale(total.astype(first.vector.dtype), first.tied, first.fused)


def _dense(
    name: str, leaves: Mapping[str, Array], contributions: Sequence[Patch], weights: Sequence[Any]
) -> Any:
    """Return the leaf with the weighted sum of what all patches do to it."""
    from fishjax.patches import Dense, touched

    wide = tree.wide_dtype(leaves[name].dtype)
    base = np.asarray(leaves[name]).astype(wide)
    total = np.zeros_like(base)
    for w, patch in zip(weights, contributions, strict=True):
        for owner, kind in patch.items():
            if name in (reach := touched({owner: kind})):
                folded = kind.fold(owner, {n: leaves[n].astype(wide) for n in reach})[name]
                total += wide.type(w) * (np.asarray(folded, wide) - base)
    return Dense((base + total).astype(leaves[name].dtype))
