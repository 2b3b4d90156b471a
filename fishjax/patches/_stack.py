"""Several patches side by side, and a choice of one for each example of a batch.

Of every leaf and every kind of change the numbers of all patches lie in one array, a row for each patch
that has it, so a batch of any mixture is one program and a choice is a lookup of rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import leaves, tree
from fishjax.errors import UsageError
from fishjax.patches._apply import touched
from fishjax.patches._dense import Dense
from fishjax.patches._ia3 import Scale
from fishjax.patches._lora import LowRank
from fishjax.types import Array, Patch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What several patches do to one leaf in the same way."""

    kind: Any  # a `Scale`, `LowRank` or `Dense` whose arrays have a leading axis, one row for each owner
    owners: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # places of the patches
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # beyond them factors are zero
    scales: tuple[float, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Patches side by side; `partition` splits off what is trained as it does of one patch."""

    layers: tuple[dict[str, Rows], ...]  # applied one after another; in each, a leaf is changed once
    count: int = dataclasses.field(metadata={"static": True})  # how many patches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """One patch for each example; only `unfolded` takes it."""

    stacked: Stacked
    task_ids: Array  # int [B]


def stack(patches: Sequence[Patch]) -> Stacked:
    """Lay patches side by side, for `select` to choose from.

    They may be of different kinds and ranks, and change different leaves: a patch without an entry for a
    leaf leaves it as it is, also in training.

    Args:
      patches: at least one; with `Scale`, `LowRank`, and `Dense` entries of vectors (biases, norms). Entries
        that replace entries of matrices would need a copy of the matrix for each example.

    Raises:
      UsageError: no patch, or an entry that cannot be stacked.

    >>> from fishjax.patches import unfolded
    >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((3, 2))
    >>> stacked = stack([{"w": Scale(jnp.full((1, 1), s))} for s in (2.0, 5.0)])
    >>> patch = select(stacked, [1, -1, 0])
    >>> unfolded(lambda params, x: x @ params["w"])(params, patch, x)[:, 0].tolist()
    [10.0, 2.0, 4.0]
    """
    if not patches:
        raise UsageError("`patches` must hold at least one patch; got none")
    groups: dict[tuple, list[tuple[int, Any]]] = {}
    for i, patch in enumerate(patches):
        for name, kind in patch.items():
            groups.setdefault((name, *_form(name, kind)), []).append((i, kind))
    layers: list[dict[str, Rows]] = []
    for (name, *_), members in groups.items():
        mine = set(touched({name: members[0][1]}))
        free = [x for x in layers if not mine & set(touched({n: rows.kind for n, rows in x.items()}))]
        if not free:
            free = [{}]
            layers += free
        free[0][name] = _rows(members)
    return Stacked(tuple(layers), len(patches))


def unstack(stacked: Stacked) -> list[Patch]:
    """Return the patches that were stacked, as they are now: after a training, the trained ones.

    >>> patch = {"w": Scale(jnp.array([[2.0, 3.0]]))}
    >>> [list(p) for p in unstack(stack([patch, {}]))]
    [['w'], []]
    """
    patches: list[Patch] = [{} for _ in range(stacked.count)]
    for name, rows in [item for layer in stacked.layers for item in layer.items()]:
        for row, (owner, rank, scale) in enumerate(zip(rows.owners, rows.ranks, rows.scales, strict=True)):
            kind = jax.tree.map(lambda x, row=row: x[row], rows.kind)
            if isinstance(kind, LowRank):
                kind = LowRank(kind.a[..., :rank], kind.b[..., :rank], scale)
            patches[owner][name] = kind  # type: ignore[index]
    return patches


def select(stacked: Stacked, task_ids: Any) -> Selected:
    """Choose one patch for each example of a batch.

    Args:
      stacked: of `stack`.
      task_ids: int `[B]`, places in the list that was stacked; -1: none. Ids that are traced cannot be
        checked: one that is out of range gives NaN.

    Raises:
      UsageError: an id that is out of range, or no integer; patches that are not stacked.

    >>> select(stack([{"w": Scale(jnp.ones((1, 2)))}]), [0, 1])
    Traceback (most recent call last):
        ...
    fishjax.errors.UsageError: `task_ids` must lie in [-1, 0] with 1 patch stacked; got 1
    """
    if not isinstance(stacked, Stacked):
        raise UsageError(
            f"`stacked` must be the result of `patches.stack`; got {type(stacked).__name__}. Stack the "
            "patches first: `select(stack([p0, p1]), task_ids)`"
        )
    ids = task_ids if isinstance(task_ids, jax.Array) else np.asarray(task_ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UsageError(f"`task_ids` must be integers [B]; got {tree.describe(ids)}")
    if not isinstance(ids, jax.core.Tracer):
        concrete = np.asarray(ids).astype(np.int64)
        if (odd := concrete[(concrete < -1) | (concrete >= stacked.count)]).size:
            several = f"{stacked.count} patch" + "es" * (stacked.count != 1)
            raise UsageError(
                f"`task_ids` must lie in [-1, {stacked.count - 1}] with {several} stacked; got {odd[0]}"
            )
        ids = jnp.asarray(concrete, jnp.int32)
    return Selected(stacked, ids)


def part(patch: Any, keep: Callable[[str], bool]) -> Any:
    """Return the entries of leaves with certain names, of a patch, a sequence of them, or a selection."""
    if isinstance(patch, Selected):
        layers = tuple(part(layer, keep) for layer in patch.stacked.layers)
        return Selected(Stacked(layers, patch.stacked.count), patch.task_ids)
    if isinstance(patch, Mapping):
        return {name: kind for name, kind in patch.items() if keep(name)}
    return [part(p, keep) for p in patch]


def adapter(stacked: Stacked, task_id: Array, flat: Mapping[str, Any]) -> list[Patch]:
    """Return the patches, to be applied one after another, that one task id stands for.

    Args:
      task_id: a scalar; -1 changes nothing, one that is out of range gives NaN.
      flat: the base's leaves by name.
    """
    wrong = (task_id < -1) | (task_id >= stacked.count)

    def chosen(name: str, rows: Rows) -> Any:
        places = np.full(stacked.count + 1, -1, np.int32)  # the last is what -1 stands for
        places[list(rows.owners)] = np.arange(len(rows.owners))
        row = jnp.asarray(places)[jnp.where(wrong, -1, task_id)]

        def pick(numbers: Array, neutral: Any) -> Array:
            mine = jnp.take(numbers, row, axis=0, mode="clip")
            neutral = jnp.where(wrong, jnp.asarray(jnp.nan, mine.dtype), jnp.asarray(neutral, mine.dtype))
            return jnp.where(row >= 0, mine, neutral)

        if isinstance(rows.kind, LowRank):
            scale = jnp.asarray(rows.scales, rows.kind.b.dtype)[row]
            return LowRank(pick(rows.kind.a, 0), pick(rows.kind.b, 0) * scale)
        if isinstance(rows.kind, Scale):
            return dataclasses.replace(rows.kind, vector=pick(rows.kind.vector, 1))
        return Dense(pick(rows.kind.values, leaves.array(flat[name])))

    return [{name: chosen(name, rows) for name, rows in layer.items()} for layer in stacked.layers]


def _form(name: str, kind: Any) -> tuple:
    """Return what entries must share to lie in one array."""
    if isinstance(kind, Scale):
        return Scale, tuple(kind.vector.shape), kind.tied, kind.fused
    if isinstance(kind, LowRank):
        return LowRank, tuple(kind.a.shape[:-1]), tuple(kind.b.shape[:-1])
    if isinstance(kind, Dense) and kind.values.ndim < 2:
        return Dense, tuple(kind.values.shape)
    raise UsageError(
        f"scales, low-rank products and replaced vectors can be stacked; `{name}` is changed by "
        f"{type(kind).__name__}, for which every example would need a weight of its own: run this patch in a "
        "batch by itself"
    )


def _rows(members: Sequence[tuple[int, Any]]) -> Rows:
    owners, kinds = zip(*members, strict=True)
    if not isinstance(kinds[0], LowRank):
        kind = jax.tree.map(_stack_arrays, *kinds)
        return Rows(kind, owners, (0,) * len(kinds), (1.0,) * len(kinds))
    ranks = tuple(k.a.shape[-1] for k in kinds)
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(ranks) - x.shape[-1])])
    a, b = (_stack_arrays(*(pad(getattr(k, field)) for k in kinds)) for field in "ab")
    return Rows(LowRank(a, b), owners, ranks, tuple(k.scale for k in kinds))


def _stack_arrays(*arrays: Array) -> Array:
    dtype = (
        jnp.result_type(*(x.dtype for x in arrays)) if len({x.dtype for x in arrays}) > 1 else arrays[0].dtype
    )
    return jnp.stack([jnp.asarray(x, dtype) for x in arrays])
