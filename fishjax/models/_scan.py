"""Equal blocks in one `lax.scan`: compiled once, and what one step of it needs is free before the next.

In a stacked tree the leaves of blocks `encoder.block.0`, `encoder.block.1` ... are `encoder.block.*. ...`
with a leading axis, one entry a block. What not all of them have keeps its name.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fishjax import leaves, tree
from fishjax.errors import StructureError
from fishjax.models._model import Model, subtree
from fishjax.patches import Sparse
from fishjax.types import Array, Batch, Params, Patch


def scanned(model: Model, *, remat: bool = False) -> Model:
    """Return the model on stacked parameters: equal blocks that follow each other run in a scan.

    Args:
      remat: compute each block again in the backward pass (as `remat`, which does not go on top of this).

    >>> from fishjax import models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 6}
    >>> model = models.build(config | {"n_layer": 3})
    >>> params, batch = model.init(jax.random.key(0)), {"input_ids": jnp.array([[3, 1]])}
    >>> stacked = models.stack_blocks(model, params)
    >>> stacked["transformer"]["h"]["*"]["ln_1"]["weight"].shape
    (3, 8)
    >>> models.scanned(model).apply(stacked, batch).shape
    (1, 2, 11)
    """
    embed, block, head = model.embed, model.block, model.head
    assert embed is not None and block is not None and head is not None  # every family has them

    def run(name: str, stacked: Params, carry: Any) -> Any:
        start, structure = jax.tree.flatten(carry)
        one = jax.tree.map(lambda x: x[0], stacked)
        out_of = lambda p, c: jax.tree.leaves(block(name, p, jax.tree.unflatten(structure, c)))
        traced = jax.make_jaxpr(out_of)(one, start).jaxpr
        # What a block only hands on is no part of the scan's carry, which the backward pass keeps for each.
        given = traced.invars[len(jax.tree.leaves(one)) :]
        moves = [i for i, (x, y) in enumerate(zip(given, traced.outvars, strict=True)) if x is not y]

        def body(moving: list[Array], p: Params) -> tuple[list[Array], None]:
            now = dict(zip(moves, moving, strict=True))
            out = out_of(p, [now.get(i, x) for i, x in enumerate(start)])
            return [out[i] for i in moves], None

        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        last = dict(zip(moves, jax.lax.scan(body, [start[i] for i in moves], stacked)[0], strict=True))
        return jax.tree.unflatten(structure, [last.get(i, x) for i, x in enumerate(start)])

    def apply(params: Params, batch: Batch) -> Array:
        carry = embed(params, batch)
        for names in model.runs:
            if len(names) > 1:
                carry = run(names[0], subtree(params, _star(names)), carry)
            else:
                carry = block(names[0], subtree(params, names[0]), carry)
        return head(params, carry)

    return model._replace(init=lambda key: stack_blocks(model, model.init(key)), apply=apply)


def stack_blocks(model: Model, params: Params, *, donate: bool = False) -> Params:
    """Return the parameters with those of equal blocks stacked, one kind of leaf after the other.

    Args:
      params: of `model`; leaves that lie on a mesh stay on it, every block divided as it was.
      donate: give them away, so that no more than one kind of leaf is there twice.
    """
    flat = tree.flatten(params)
    for star, rest, run in _stacks(model, flat):
        parts = [flat.pop(f"{block}.{rest}") for block in run]
        flat[f"{star}.{rest}"] = jax.block_until_ready(_stack(parts)) if donate else _stack(parts)
        for x in jax.tree.leaves(parts) if donate else ():
            x.delete()
    return tree.nest(flat)


def stack_patch(model: Model, params: Params, patch: Patch) -> Patch:
    """Return a patch of `params` as one of the stacked parameters.

    Args:
      params: of `model`, not stacked, or their shapes.

    Raises:
      StructureError: the same leaf of different blocks is patched in different ways (other kinds, shapes,
        scales), or not in all of them; sparse patches may differ.
    """
    flat, entries = tree.flatten(params), dict(patch)
    for star, rest, run in _stacks(model, flat):
        kinds = {i: entries.pop(n) for i, b in enumerate(run) if (n := f"{b}.{rest}") in entries}
        if not kinds:
            continue
        if all(isinstance(kind, Sparse) for kind in kinds.values()):
            entries[f"{star}.{rest}"] = _join(kinds, flat[f"{run[0]}.{rest}"].size)
            continue
        alike = [_starred(kind, run[i], star, len(run)) for i, kind in kinds.items()]
        forms = {(jax.tree.structure(k), *(x.shape for x in jax.tree.leaves(k))) for k in alike}
        if len(alike) < len(run) or len(forms) > 1:
            raise StructureError(
                f"`{star}.{rest}` is patched in {len(alike)} of {len(run)} blocks and in {len(forms)} forms; "
                "in a scan all blocks are patched alike. Train without `scan`"
            )
        entries[f"{star}.{rest}"] = jax.tree.map(lambda *xs: _stack(xs), *alike)
    return entries


def unstack_patch(model: Model, params: Params, patch: Patch) -> Patch:
    """Undo `stack_patch`."""
    flat, entries = tree.flatten(params), dict(patch)
    for star, rest, run in _stacks(model, flat):
        kind = entries.pop(f"{star}.{rest}", None)
        for i, block in enumerate(run if kind is not None else ()):
            if isinstance(kind, Sparse):
                one = _part(kind, i, flat[f"{block}.{rest}"].size)
                entries |= {f"{block}.{rest}": one} if one.indices.size else {}
            else:
                one = jax.tree.map(lambda x, i=i: x[i], kind)
                entries[f"{block}.{rest}"] = _starred(one, star, block, 0)
    return entries


def _stacks(model: Model, flat: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the run's name, a leaf's name in its blocks and the blocks, for each leaf that all have."""
    for run in model.runs:
        if len(run) > 1:
            first = f"{run[0]}."
            for rest in [n.removeprefix(first) for n in flat if n.startswith(first)]:
                if all(f"{block}.{rest}" in flat for block in run):
                    yield _star(run), rest, run


def _star(run: Sequence[str]) -> str:
    return re.sub(r"\d+$", "*", run[0])


def _stack(parts: Sequence[Any]) -> Any:
    """Stack arrays, or the arrays of quantised weights, which then lose their names."""
    nameless = [dataclasses.replace(x, name="") if leaves.is_leaf(x) else x for x in parts]
    return jax.tree.map(lambda *xs: _stack_arrays(xs), *nameless)


def _stack_arrays(parts: Sequence[Array]) -> Array:
    sharding = getattr(parts[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.stack(parts)
    where = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(lambda *xs: jnp.stack(xs), out_shardings=where)(*parts)


def _starred(kind: Any, block: str, other: str, length: int) -> Any:
    """Return a kind whose tied leaves are named in another block, with a leading axis or (0) without one."""
    if not getattr(kind, "tied", ()):
        return kind
    shape = lambda s: (length, *s) if length else s[1:]
    tied = tuple((other + n.removeprefix(block), shape(s)) for n, s in kind.tied)
    return dataclasses.replace(kind, tied=tied)


def _join(kinds: Mapping[int, Sparse], size: int) -> Sparse:
    """Return the new values of several blocks as those of one stacked leaf."""
    indices = jnp.concatenate([i * size + jnp.asarray(kind.indices) for i, kind in kinds.items()])
    return Sparse(indices, jnp.concatenate([jnp.asarray(kind.values) for kind in kinds.values()]))


def _part(kind: Sparse, block: int, size: int) -> Sparse:
    begin, end = np.searchsorted(np.asarray(kind.indices), [block * size, (block + 1) * size])
    return Sparse(kind.indices[begin:end] - block * size, kind.values[begin:end])
