"""Training a patch on rows: the step, the batches, the mesh."""

import os
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from fishjax import data, leaves, mesh, models, patches, train
from fishjax.errors import UsageError
from fishjax.types import Batch, Mask, Params, Patch


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam with a tenth of the steps as warm-up, then a cosine to zero."""
    warmup = min(max(1, steps // 10), steps - 1)  # a single step has none
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return optax.adam(schedule)


def fit(
    patch: Patch,
    base: Params,
    model: models.Model,
    rows: Batch,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    description: str = "training",
    loss: Callable[[models.Model], Any] = models.example_loss,
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam,
    remat: bool = False,
    scan: bool = False,
    batched: bool = False,
    refresh: tuple[Callable[[Params], Mask], int] | None = None,
) -> Patch:
    """Train a patch.

    Args:
      base: on one device, or on a mesh (`mesh.shard`) over which patch, moments and batches then follow.
      rows: `{field: [n, ...]}`, batches of which are drawn by the seed.
      steps, batch_size: at least 1.
      folder: where the training's state is kept; a training that was stopped goes on from there.
      loss: of a model; `train.tfew_loss` where examples have choices.
      optimizer: of the highest learning rate and the number of steps; `train.adafactor` is T-Few's.
      remat: compute each block again in the backward pass, which saves memory (`models.remat`).
      scan: `base` and `patch` are stacked (`models.stack_blocks`) and equal blocks run in a scan: compiled
        faster, and on a mesh no more than one block's weights are gathered at a time.
      batched: `loss` gives the loss of a whole batch (`train.legacy_tfew_loss`).
      refresh: what chooses another mask of the weights, and the steps after which it does
        (`train.fit_refreshed`); the patch then has all that was learnt.
    """
    rule, on = optimizer(learning_rate, steps), mesh.mesh_of(base)

    def batches():
        drawn = data.batches(rows, min(batch_size, data.examples(rows)), seed=seed, epochs=None)
        return (mesh.shard_batch(batch, on) for batch in drawn)

    place = lambda state: mesh.follow(state, base)
    start, step = (
        place(train.init(patch, rule)),
        make_step(model, rule, on, loss=loss, remat=remat, scan=scan, batched=batched),
    )
    options: dict[str, Any] = {"steps": steps, "folder": folder, "description": description}
    if refresh is None:
        return train.patch_of(train.fit(start, step, base, batches(), **options)[0])
    choose, every = refresh
    options |= {"refresh_every": every, "place": place}
    state, params, _ = train.fit_refreshed(start, step, base, batches, choose, rule, **options)
    return patches.diff(base, patches.apply(params, train.patch_of(state)))


def make_step(
    model: models.Model,
    optimizer: optax.GradientTransformation,
    on: mesh.AnyMesh | None = None,
    *,
    loss: Callable[[models.Model], Any] = models.example_loss,
    remat: bool = False,
    scan: bool = False,
    batched: bool = False,
) -> train.Step:
    """Return the step that `fit` takes: patched weights are not formed, examples are spread over a mesh.

    On a mesh whose only axis is `data`, devices hold the whole model each and all-reduce the patch's
    gradient alone (`train.make_parallel_step`).

    Args:
      on: the mesh of the parameters, if they lie on one.
      loss, remat, scan, batched: as of `fit`.

    Raises:
      UsageError: the loss of a whole batch where each device has its own part of it.
    """
    whole = isinstance(on, Mesh) and tuple(on.shape) == ("data",)
    held = model if on is None or whole else mesh.constrain(model, on)
    held = models.scanned(held, remat=remat) if scan else models.remat(held) if remat else held
    loss_fn = loss(held)
    if isinstance(on, Mesh) and whole:
        if batched:
            raise UsageError("the loss of a whole batch does not go over a mesh of `data` alone; add an axis")
        return train.make_parallel_step(leaves.interpret(loss_fn), optimizer, on, apply=patches.unfold)
    over = mesh.batch_axes(on)
    return train.make_step(
        leaves.interpret(loss_fn), optimizer, apply=patches.unfold, over=over, batched=batched
    )
