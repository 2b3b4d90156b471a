"""The engine in memory: a rule applied leaf by leaf to trees of any kind, eager, jitted or sharded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._rule import Block, Rule, is_inexact, is_traced
from fishjax.merge._statistics import measure, widen
from fishjax.types import Array, Params

Keep = tree.Rules[int | None]


def merge_trees(
    rule: Rule,
    models: Sequence[Params],
    *,
    base: Params | None = None,
    beside: Mapping[str, Params | Sequence[Params]] | None = None,
    keep: Keep | None = None,
    **options: Any,
) -> Params:
    """Return the tree that a rule makes of several models, leaf by leaf, in their own dtypes."""
    flats = [tree.flatten(m) for m in models]
    kept = kept_leaves(flats, keep)
    options = rule.check(len(flats), **options)
    merged = [{n: x for n, x in flat.items() if n not in kept} for flat in flats]
    check_models(merged)
    result = {n: flats[i][n] for n, i in kept.items() if n in flats[i]}
    for name, first in merged[0].items():
        if not is_inexact(first.dtype):
            check_equal(name, [flat[name] for flat in merged])
            result[name] = first
    inexact = {n: x for n, x in merged[0].items() if n not in result}
    if rule.needs_base and base is None:
        raise UsageError("`base` must be given: this method merges what the models changed")
    origin = _beside(base, inexact, "base") if rule.needs_base else {}
    near = {word: _near(word, trees, flats, inexact) for word, trees in (beside or {}).items()}
    blocks = {
        name: Block(
            name=name,
            models=[flat[name] for flat in merged],
            base=origin.get(name),
            beside={word: [flat[name] for flat in flats] for word, flats in near.items()},
            positions=_positions(first) if rule.random else None,
        )
        for name, first in inexact.items()
    }
    blocks = {n: widen(b, tree.wide_dtype(inexact[n].dtype)) for n, b in blocks.items()}
    check_beside(blocks.values())
    measured = measure(rule, blocks, options)
    for name, block in blocks.items():
        merged_leaf = rule.leaf(block._replace(measured=measured[name]), **options)
        result[name] = merged_leaf.astype(inexact[name].dtype)
    if set(result) == set(flats[0]):
        return tree.rebuild(models[0], result)
    return tree.nest(result)


def kept_leaves(flats: Sequence[Mapping[str, Any]], keep: Keep | None) -> dict[str, int]:
    """Return which leaves are taken whole from which model.

    Raises:
      UsageError: a rule matches no leaf of any model, or names a model that is not there.
    """
    if not flats:
        raise UsageError("`models` must hold at least one model; got none")
    names = sorted({n for flat in flats for n in flat})
    kept = {n: i for n, i in tree.match(keep or [], names).items() if i is not None}
    for name, i in kept.items():
        if not 0 <= i < len(flats):
            raise UsageError(f"`keep` takes `{name}` from model {i}; there are models 0 to {len(flats) - 1}")
    return kept


def check_models(models: Sequence[Params], paths: Sequence[Any] | None = None) -> None:
    """Raise unless all models have the same leaves; the message shows both sides, and whose they are."""
    for i, other in enumerate(models[1:], 1):
        try:
            tree.check_same(models[0], other, ("model 0", f"model {i}"))
        except StructureError as error:
            names = f" (model 0 is `{paths[0]}`, model {i} is `{paths[i]}`)" if paths else ""
            raise StructureError(
                f"{error}; a leaf that is not to be merged is taken from one model by `keep`{names}"
            ) from None


def check_equal(name: str, leaves: Sequence[Array]) -> None:
    """Raise unless a leaf of integers (or bools) is the same in every model.

    Raises:
      StructureError: it differs, or its values are not known yet (under `jit`).
    """
    if any(is_traced(x) for x in leaves):
        raise StructureError(
            f"`{name}` is {tree.describe(leaves[0])} and cannot be compared under `jit`; "
            "take it from one model by `keep`"
        )
    for i, x in enumerate(leaves[1:], 1):
        if not np.array_equal(np.asarray(leaves[0]), np.asarray(x)):
            raise StructureError(
                f"`{name}` is {tree.describe(x)}, which cannot be averaged, and differs between model 0 "
                f"and model {i}; take it from one model by `keep`"
            )


def check_beside(blocks: Any) -> None:
    """Raise unless the Fishers in blocks are >= 0 and their sums finite (traced ones cannot be looked at).

    Raises:
      UsageError: one is not; its leaf is named.
    """
    for block in blocks:
        for word, i, x in [(w, i, x) for w, xs in block.beside.items() for i, x in enumerate(xs)]:
            if not x.size:
                continue
            most = float(ml_dtypes.finfo(x.dtype).max) / (4 * len(block.models))
            if isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float64):
                # In one pass: the bits of floats >= 0 are in their order, below those of all others.
                bits = np.dtype(f"u{x.itemsize}")
                if x.view(bits).max() <= x.dtype.type(most).view(bits):
                    continue
            fine = (x.min() >= 0) & (x.max() <= most)  # a NaN is both, and neither holds
            if not is_traced(fine) and not bool(fine):
                raise UsageError(
                    f"`{word}` (number {i}) must be finite and >= 0, and at most {most:.2g} for sums to "
                    f"be finite; `{block.name}` is not everywhere"
                )


def _near(
    word: str, trees: Any, models: Sequence[Any], wanted: Mapping[str, Array]
) -> list[dict[str, Array]]:
    """Return the leaves beside those to be merged of one tree, or of each of a list."""
    if not isinstance(trees, (list, tuple)):
        if word != "fishers":
            return [_beside(trees, wanted, f"`{word}`")]
        trees = [trees]
    if len(trees) != len(models):
        raise UsageError(f"`{word}` must be one for each of the {len(models)} models; got {len(trees)}")
    return [_beside(t, wanted, f"`{word}` of model {i}") for i, t in enumerate(trees)]


def _beside(other: Params, wanted: Mapping[str, Array], what: str) -> dict[str, Array]:
    """Return the leaves of another tree that lie beside those to be merged, of the same shapes."""
    flat = tree.flatten(other)
    found = {n: flat[n] for n in wanted if n in flat}
    tree.check_same(wanted, found, ("the models", what), dtypes=False)
    return found


def _positions(leaf: Array) -> Array:
    """Return the flat position of every entry of a leaf, in its shape (so that a sharding carries over)."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.arange(leaf.size, dtype=np.uint64).reshape(leaf.shape)
    if leaf.size >= 2**32:
        raise UsageError("a leaf of 2^32 entries or more cannot be merged at random in memory; merge files")
    import jax
    import jax.numpy as jnp

    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :])
        position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return position
