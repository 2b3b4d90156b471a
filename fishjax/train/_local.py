"""Workers that take some steps by themselves before their changes of a patch are averaged.

Local steps (DiLoCo, arXiv 2311.08105) with a FISH mask (arXiv 2111.09839, section 4.2).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fishjax import patches, tree
from fishjax.checkpoint import _rice
from fishjax.errors import UsageError
from fishjax.train._step import Step, TrainState, mean_loss
from fishjax.train._sync import check_batch, workers
from fishjax.types import Array, Batch, LossFn, Mask, Params, Patch

BLOCK = 256  # numbers that share one scale under int8


class WorkersState(NamedTuple):
    """What takes the place of an optimiser's state under local steps; W workers, K numbers in the patch."""

    inner: optax.OptState  # `[W, ...]`, each worker's own
    outer: optax.OptState
    own: Array | None  # int32 `[W, k]`: which of the K numbers a worker trains, padded with K; None: all
    weight: Array | None  # `[K]`: one over the number of workers that train a number
    unsent: Array | None  # `[W, k]`: what rounding to int8 has held back so far


class LocalSteps(NamedTuple):
    """A start and a step, as of `init` and `make_step`."""

    init: Callable[..., TrainState]  # `init(patch, masks=None)`; masks: one for each worker
    step: Step


def local_steps(
    loss_fn: LossFn,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    steps: int,
    axis: str = "data",
    wire: str = "float",
    apply: Callable[[Params, Patch], Params] = patches.apply,
) -> LocalSteps:
    """Return a step in which every worker takes `steps` steps by itself before the changes are averaged.

    Each number of the patch moves by the mean change of those workers that train it, taken as a gradient by
    the outer optimiser. Without masks all workers train all of it. With one mask each (`masks.split` makes
    disjoint ones, whose changes then simply add up) start from `patches.init_sparse(params,
    masks.union(*parts))`; a worker then trains and sends the numbers of its own mask alone. A number in
    several masks (a head that is always trained) is averaged over those, never counted twice.

    Args:
      loss_fn, apply: as in `make_step`.
      inner: each worker's optimiser; sees the trained numbers as one vector `[k]`, and its state stays
        with the worker.
      outer: what takes the averaged change, as one vector `[K]`: `optax.sgd(1.0)` is the plain mean, DiLoCo
        takes `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
      mesh, axis: the workers are the devices along this axis.
      steps: H, at least 1. A batch of the step holds H batches for every worker, `[W * H * b, ...]`:
        the first H * b examples are the first worker's.
      wire: `"float"`, or `"int8"`: 8 bits a number and a float32 scale for each block of 256. One change
        is off by at most 1/254 of the largest in its block, and what rounding held back is sent with the
        next one.

    Returns:
      `init(patch, masks=None)` and `step`; the loss is the mean over workers and local steps. The state
      counts merges as steps.

    Raises:
      UsageError: an argument out of range; masks that are not one for each worker or leave the patch.

    References: Douillard et al. 2023, arXiv 2311.08105, algorithm 1; Sung et al. 2021, arXiv 2111.09839,
    section 4.2.

    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> ways = local_steps(loss, optax.sgd(0.25), optax.sgd(1.0), mesh, steps=2)
    >>> state = ways.init({"w": patches.Sparse(jnp.array([1]), jnp.array([2.0]))})
    >>> state, _ = jax.jit(ways.step)(state, {"w": jnp.array([0.0, 2.0])}, {"x": jnp.ones((4, 2))})
    >>> state.trainable["w"].values
    Array([0.5], dtype=float32)
    """
    count = workers(mesh, axis)
    if steps < 1:
        raise UsageError(f"`steps` must be at least 1; got {steps}")
    if wire not in ("float", "int8"):
        raise UsageError(f'`wire` must be "float" or "int8"; got {wire!r}')
    loss_of = mean_loss(loss_fn, apply)
    each, same = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())

    def start(patch: Patch, masks: Sequence[Mask] | None = None) -> TrainState:
        trainable, fixed = patches.partition(patch)
        own = None if masks is None else _places(patch, masks, count)
        vector, _ = ravel_pytree(trainable)
        size = vector.size if own is None else own.shape[1]
        times = None if own is None else np.maximum(np.bincount(own.ravel(), minlength=vector.size + 1), 1)

        def make(trainable, fixed, own):
            vector, _ = ravel_pytree(trainable)
            places = own if own is not None else jnp.arange(size, dtype=jnp.int32)[None].repeat(count, 0)
            weight = None if times is None else jnp.asarray(1 / times[:-1], vector.dtype)
            unsent = jnp.zeros((count, size), vector.dtype) if wire == "int8" else None
            mine = jax.vmap(lambda own: inner.init(_take(vector, own)))(places)
            opt_state = WorkersState(mine, outer.init(vector), own, weight, unsent)
            return TrainState(jax.tree.map(jnp.copy, trainable), fixed, opt_state, jnp.zeros((), jnp.int32))

        return jax.jit(make, out_shardings=_laid_out(each, same))(trainable, fixed, own)

    def work(state: TrainState, params: Params, batch: Batch):
        vector, unravel = ravel_pytree(state.trainable)
        held = state.opt_state
        own = None if held.own is None else held.own[jax.lax.axis_index(axis)]
        before = _take(vector, own)

        def loss(mine, part):
            whole = mine if own is None else vector.at[own].set(mine, mode="drop")
            return loss_of(unravel(whole), state.fixed, params, part)

        def one(carry, part):
            mine, opt_state = carry
            value, grads = jax.value_and_grad(loss)(mine, part)
            updates, opt_state = inner.update(grads, opt_state, mine)
            return (optax.apply_updates(mine, updates), opt_state), value

        parts = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), batch)
        opt_state = jax.tree.map(lambda x: x[0], held.inner)
        (after, opt_state), losses = jax.lax.scan(one, (before, opt_state), parts)
        change, unsent = after - before, None
        if wire == "int8":
            change = change + held.unsent[0]
            packed = _pack(change)
            unpack = lambda packed, scale: _unpack(packed, scale, change.dtype)
            unsent = (change - unpack(*packed))[None]
            everyone = jax.vmap(unpack)(*jax.lax.all_gather(packed, axis))
            mean = everyone.mean(0) if own is None else _together(everyone, held)
        elif own is None:
            mean = jax.lax.pmean(change, axis)
        else:
            mean = _together(jax.lax.all_gather(change, axis), held)
        mine = jax.tree.map(lambda x: x[None], opt_state)
        return mean, mine, unsent, jax.lax.pmean(losses.mean(), axis)

    # Nothing is differentiated across workers, so what is the same on all of them need not be proved.
    together = jax.shard_map(
        work,
        mesh=mesh,
        in_specs=(_laid_out(P(axis), P()), P(), P(axis)),
        out_specs=(P(), P(axis), P(axis), P()),
        axis_names={axis},
        check_vma=False,
    )

    def step(state: TrainState, params: Params, batch: Batch) -> tuple[TrainState, Array]:
        check_batch(batch, mesh, axis, steps)
        vector, unravel = ravel_pytree(state.trainable)
        change, mine, unsent, loss = together(state, params, batch)
        updates, outer_state = outer.update(-change, state.opt_state.outer, vector)
        trainable = unravel(optax.apply_updates(vector, updates))
        held = state.opt_state._replace(inner=mine, outer=outer_state, unsent=unsent)
        return TrainState(trainable, state.fixed, held, state.step + 1), loss

    return LocalSteps(start, step)


class Traffic(NamedTuple):
    """What one worker sends, in bytes; a collective may pass it on, a ring twice (W - 1) / W times."""

    values: int  # at every merge
    indices: int  # once for every mask


def bytes_sent(patch: Patch, *, wire: str = "float") -> Traffic:
    """Return what one worker that trains this patch sends: its own one, where masks differ.

    Args:
      wire: as in `local_steps`.

    >>> bytes_sent({"w": patches.Sparse(jnp.arange(0, 8000, 80), jnp.ones(100))})
    Traffic(values=400, indices=101)
    >>> bytes_sent({"w": patches.Sparse(jnp.arange(0, 8000, 80), jnp.ones(100))}, wire="int8").values
    104
    """
    trainable, fixed = patches.partition(patch)
    leaves = jax.tree.leaves(trainable)
    count = sum(x.size for x in leaves)
    values = sum(x.nbytes for x in leaves) if wire == "float" else count + 4 * -(-count // BLOCK)
    return Traffic(values, sum(_rice.encode(np.asarray(x))[1].nbytes for x in jax.tree.leaves(fixed)))


def _laid_out(each: Any, same: Any) -> TrainState:
    """Return what of a state each worker has for itself, and what is the same on all."""
    return TrainState(same, same, WorkersState(each, same, same, same, each), same)


def _take(vector: Array, own: Array | None) -> Array:
    return vector if own is None else vector.at[own].get(mode="fill", fill_value=0)


def _together(changes: Array, held: WorkersState) -> Array:
    """Add up the workers' changes `[W, k]` at their places, and divide where several trained a number."""
    assert held.own is not None and held.weight is not None
    zeros = jnp.zeros(held.weight.shape, changes.dtype)
    return zeros.at[held.own.reshape(-1)].add(changes.reshape(-1), mode="drop") * held.weight


def _pack(values: Array) -> tuple[Array, Array]:
    """Return int8 `[k]` and a float32 scale for each block of 256."""
    blocks = jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    scale = jnp.abs(blocks).max(1).astype(jnp.float32) / 127
    divisor = jnp.where(scale == 0, 1, scale).astype(values.dtype)[:, None]
    return jnp.round(blocks / divisor).astype(jnp.int8).reshape(-1)[: values.size], scale


def _unpack(packed: Array, scale: Array, dtype) -> Array:
    """Undo `_pack`, up to its rounding."""
    return packed.astype(dtype) * scale.astype(dtype).repeat(BLOCK)[: packed.size]


def _places(patch: Patch, masks: Sequence[Mask], count: int) -> np.ndarray:
    """Return where in the raveled patch the numbers of each worker's mask are, `[W, k]`."""
    if len(masks) != count:
        raise UsageError(f"`masks` must be one for each of the {count} workers; got {len(masks)}")
    kinds = jax.tree.leaves(patch, is_leaf=lambda x: isinstance(x, patches.Sparse))
    if not all(isinstance(kind, patches.Sparse) for kind in kinds):
        raise UsageError("masks of their own need a sparse patch; make it by `patches.init_sparse`")
    rows = []
    for number, mask in enumerate(masks):
        flat = {n: np.asarray(m).reshape(-1) for n, m in tree.flatten(mask).items()}
        kept = [flat[name][np.asarray(patch[name].indices)] for name in sorted(patch)]
        rows.append(np.flatnonzero(np.concatenate(kept)))
        if rows[-1].size != sum(int(m.sum()) for m in flat.values()) or not rows[-1].size:
            raise UsageError(
                f"mask {number} must keep entries of the patch only, and some; start from "
                "`patches.init_sparse(params, masks.union(*parts))`"
            )
    total = sum(patch[name].indices.size for name in patch)
    places = np.full((count, max(r.size for r in rows)), total, np.int32)
    for row, where in zip(places, rows):
        row[: where.size] = where
    return places
