"""Training a patch: a pure step, and its state on disk.

The optimiser sees the patch's inexact leaves and nothing else, so its state is as small as the patch.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishjax import patches, tree
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.progress import track
from fishjax.types import Array, Batch, LossFn, Params, Patch


class TrainState(NamedTuple):
    """What a step needs and gives back."""

    trainable: Patch  # the patch's inexact leaves
    fixed: Patch  # its other leaves
    opt_state: optax.OptState  # of `trainable` alone
    step: Array  # int32, how many steps were taken


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Array]]


def init(patch: Patch, optimizer: optax.GradientTransformation) -> TrainState:
    """Start training a patch; the state owns copies, so donating it never deletes the base.

    >>> patch = {"w": patches.Sparse(jnp.array([1]), jnp.array([9.0]))}
    >>> state = init(patch, optax.adam(1e-3))
    >>> state.opt_state[0].mu["w"].indices, state.opt_state[0].mu["w"].values
    (None, Array([0.], dtype=float32))
    """
    trainable, fixed = patches.partition(jax.tree.map(jnp.copy, patch))
    return TrainState(trainable, fixed, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def patch_of(state: TrainState) -> Patch:
    """Return the patch in a training state."""
    return patches.combine(state.trainable, state.fixed)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    apply: Callable[[Params, Patch], Params] = patches.apply,
) -> Step:
    """Return `step(state, params, batch) -> (state, loss)`, pure: jit it, donate the state if you like.

    Args:
      loss_fn: the loss of ONE example, nats; a step descends its mean over the batch.
      optimizer: any optax transformation.
      apply: what a patch means.

    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> patch = {"w": patches.Sparse(jnp.array([1]), jnp.array([2.0]))}
    >>> optimizer = optax.sgd(0.25)
    >>> step = jax.jit(make_step(loss, optimizer))
    >>> state, value = step(init(patch, optimizer), {"w": jnp.array([0.0, 2.0])}, {"x": jnp.ones((4, 2))})
    >>> float(value), patch_of(state)["w"].values
    (4.0, Array([1.], dtype=float32))
    """

    def mean_loss(trainable, fixed, params, batch):
        patched = apply(params, patches.combine(trainable, fixed))
        return jax.vmap(loss_fn, (None, 0))(patched, batch).mean()

    def step(state, params, batch):
        loss, grads = jax.value_and_grad(mean_loss)(state.trainable, state.fixed, params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(trainable, state.fixed, opt_state, state.step + 1), loss

    return step


def fit(
    state: TrainState,
    step: Step,
    params: Params,
    batches: Iterable[Batch],
    *,
    steps: int,
    folder: str | os.PathLike | None = None,
    every: int = 500,
    description: str = "training",
) -> tuple[TrainState, Array]:
    """Take steps over batches; with a folder, save the state and go on from it when called again.

    Args:
      state: where to start; its arrays are given away (donated).
      step: as of `make_step`, not yet compiled.
      params: the base.
      batches: deterministic, so that a resumed training sees the same ones; at least `steps` of them.
      steps: how many steps in all, those of a resumed training included.
      folder: where the state is kept, every so many steps and at the end; None keeps it nowhere.
      every: steps between two saves.
      description: what the progress bar is called.

    Returns:
      The last state and the losses `[steps taken now]`.

    Raises:
      UsageError: the batches end too early.
    """
    if folder is not None and Path(folder).is_dir():
        state = restore_state(folder, state)
    start = int(state.step)
    compiled = jax.jit(step, donate_argnums=0)
    losses = []
    todo = itertools.islice(batches, start, steps)
    for batch in track(todo, description=description, total=steps - start):
        state, loss = compiled(state, params, batch)
        losses.append(loss)
        if folder is not None and (start + len(losses)) % every == 0:
            save_state(folder, state)
    if int(state.step) < steps:
        raise UsageError(f"`batches` ended after {int(state.step)} of {steps} steps; make them endless")
    if folder is not None and len(losses) % every:
        save_state(folder, state)
    return state, jnp.array(losses)


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Save a training state (any pytree of arrays) through Orbax, replacing what `path` held.

    Args:
      path: a folder; it appears whole or not at all.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).resolve(), _named(state), force=True)


def restore_state(path: str | os.PathLike, like: Any) -> Any:
    """Restore what `save_state` saved; training goes on bit for bit as if it had not stopped.

    Args:
      path: the folder.
      like: a state of the same structure, shapes and dtypes (a fresh `init`).

    Raises:
      UsageError: no such folder.
      StructureError: it holds another training's state.
      FileFormatError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    if not path.is_dir():
        raise UsageError(f"`{path}` is not a folder; there is no training state to restore")
    wanted = _named(like)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(path)
            found = dict(getattr(metadata, "item_metadata", metadata).tree)
        except Exception as error:
            raise FileFormatError(f"`{path}` holds no readable training state: {error}") from None
        tree.check_same(wanted, found, ("the state", f"`{path}`"))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        restored = checkpointer.restore(path, abstract)
    leaves = [restored[f"{i}"] for i in range(len(restored))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def remove_state(path: str | os.PathLike) -> None:
    """Remove a training state that is no longer needed; nothing happens if there is none."""
    shutil.rmtree(path, ignore_errors=True)


def _named(state: Any) -> dict[str, Array]:
    """Return the leaves by their place: names of a patch's leaves hold dots, which Orbax may split."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(state)]
    if not leaves:
        raise StructureError("there is nothing to save: the state has no arrays")
    return {f"{i}": x for i, x in enumerate(leaves)}
