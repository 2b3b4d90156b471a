"""The engine in memory: a rule applied leaf by leaf to trees of any kind, eager, jitted or sharded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._rule import Block, Rule, is_inexact, is_traced, wide
from fishjax.types import Array, Fisher, Params

Keep = tree.Rules[int | None]


def merge_trees(
    rule: Rule,
    models: Sequence[Params],
    *,
    base: Params | None = None,
    fishers: Sequence[Fisher] = (),
    keep: Keep | None = None,
    **options: Any,
) -> Params:
    """Return the tree that a rule makes of several models, leaf by leaf, in their own dtypes."""
    flats = [tree.flatten(m) for m in models]
    kept = kept_leaves(flats, keep)
    merged = [{n: x for n, x in flat.items() if n not in kept} for flat in flats]
    check_models(merged)
    inexact = {n: x for n, x in merged[0].items() if is_inexact(x.dtype)}
    origin = None if base is None else _beside(base, inexact, "base")
    precision = [_beside(f, inexact, f"the Fisher of model {i}") for i, f in enumerate(fishers)]

    result = {n: flats[i][n] for n, i in kept.items() if n in flats[i]}
    for name, first in merged[0].items():
        leaves = [flat[name] for flat in merged]
        if name not in inexact:
            check_equal(name, leaves)
            result[name] = first
            continue
        dtype = wide(first.dtype)
        block = Block(
            models=[x.astype(dtype) for x in leaves],
            base=None if origin is None else origin[name].astype(dtype),
            fishers=[f[name].astype(dtype) for f in precision],
        )
        result[name] = rule.leaf(block, **options).astype(first.dtype)
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


def check_models(models: Sequence[Params]) -> None:
    """Raise unless all models have the same leaves; the message shows both sides."""
    for i, other in enumerate(models[1:], 1):
        try:
            tree.check_same(models[0], other, ("model 0", f"model {i}"))
        except StructureError as error:
            raise StructureError(
                f"{error}; a leaf that is not to be merged is taken from one model by `keep`"
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


def _beside(other: Params, wanted: Mapping[str, Array], what: str) -> dict[str, Array]:
    """Return the leaves of another tree that lie beside those to be merged, of the same shapes."""
    flat = tree.flatten(other)
    found = {n: flat[n] for n in wanted if n in flat}
    tree.check_same(wanted, found, ("the models", what), dtypes=False)
    return found
