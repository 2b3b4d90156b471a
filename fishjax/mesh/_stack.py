"""The equal blocks of a model as one tree with a leading axis, and a patch of the model as one of that."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import leaves, tree
from fishjax.errors import StructureError
from fishjax.models._model import Model, subtree
from fishjax.patches import Dense, LowRank, Scale, Sparse, check, touched
from fishjax.types import Params, Patch


def stack_params(model: Model, params: Params) -> tuple[Params, Params]:
    """Return the parameters outside of the blocks, and those of the blocks with a leading axis `[L, *p]`.

    They are stacked on the host, leaf by leaf.
    """
    flat = tree.flatten(params)
    outside = tree.nest({n: x for n, x in flat.items() if not _block_of(model, n)})
    blocks = [tree.flatten(subtree(params, b)) for b in model.blocks]
    host = lambda *xs: np.stack([np.asarray(x) for x in xs])
    nameless = lambda n, x: dataclasses.replace(x, name=n) if leaves.is_leaf(x) else x
    return outside, tree.nest(
        {n: jax.tree.map(host, *(nameless(n, b[n]) for b in blocks)) for n in blocks[0]}
    )


def stack_patch(model: Model, params: Any, patch: Patch) -> tuple[Params, Patch, Patch]:
    """Return the stacked blocks, the patch of what is outside, and the patch of the blocks, stacked.

    Vectors and factors get a leading axis, ones and zeros where a block has none; new values (`Sparse`,
    `Dense`) are written into the stacked leaves.

    Raises:
      StructureError: the patch does not fit the model, or has low-rank factors of different ranks, axes or
        scales for the same leaf of different blocks.
    """
    outer: dict[str, Any] = {}
    inner: dict[str, dict[int, Any]] = {}
    for name, kind in patch.items():
        if block := _block_of(model, name):
            if getattr(kind, "tied", ()):
                inside = tuple((n.removeprefix(f"{block}."), shape) for n, shape in kind.tied)
                kind = dataclasses.replace(kind, tied=inside)
            own = inner.setdefault(name.removeprefix(f"{block}."), {})
            own[model.blocks.index(block)] = kind
        else:
            outer[name] = kind
    check(params["outside"], outer)
    flat, count = tree.flatten(params["blocks"]), len(model.blocks)
    one = {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in flat.items()}
    for i in range(count):
        check(one, {n: kinds[i] for n, kinds in inner.items() if i in kinds})
    stacked: dict[str, Any] = {}
    for name, kinds in inner.items():
        first = next(iter(kinds.values()))
        if isinstance(first, (Scale, LowRank)):
            neutral = _neutral(first)
            every = [kinds.get(i, neutral) for i in range(count)]
            if len({jax.tree.structure(k) for k in every} | {_shapes(k) for k in every}) != 2:
                raise StructureError(
                    f"the patches of `{name}` in different blocks differ in kind, rank, axes or scale; "
                    "`mesh.staged` takes any"
                )
            stacked[name] = jax.tree.map(lambda *xs: jnp.stack(xs), *every)
        else:
            flat[name] = _write(name, flat[name], kinds)
    return tree.nest(flat), outer, stacked


def _block_of(model: Model, name: str) -> str | None:
    """Return the block that a leaf is in."""
    parts = name.split(".")
    heads = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((h for h in heads if h in model.blocks), None)


def _neutral(kind: Any) -> Any:
    """Return a patch of the same shapes that changes nothing."""
    if isinstance(kind, Scale):
        return dataclasses.replace(kind, vector=jnp.ones_like(kind.vector))
    return dataclasses.replace(kind, a=jnp.zeros_like(kind.a), b=jnp.zeros_like(kind.b))


def _shapes(kind: Any) -> tuple[Any, ...]:
    return tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(kind))


def _write(name: str, stacked: Any, kinds: dict[int, Any]) -> Any:
    """Write the new values of some blocks into a stacked leaf."""
    whole = leaves.array(stacked)
    for i, kind in kinds.items():
        if isinstance(kind, Sparse):
            values = kind.values.astype(whole.dtype)
            rows = whole.reshape(len(whole), -1).at[i, kind.indices]
            whole = rows.set(values, mode="drop", indices_are_sorted=True, unique_indices=True).reshape(
                whole.shape
            )
        elif isinstance(kind, Dense) or touched({name: kind}) == [name]:
            whole = whole.at[i].set(kind.fold(name, {name: whole[i]})[name])
        else:
            raise StructureError(f"the patches of `{name}` are of different kinds; `mesh.staged` takes any")
    return whole
