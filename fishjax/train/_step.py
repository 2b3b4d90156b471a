"""A pure step: the optimiser sees the patch's inexact leaves and nothing else."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishjax import patches
from fishjax.types import Array, Batch, BatchLossFn, LossFn, Params, Patch


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
    loss_fn: LossFn | BatchLossFn,
    optimizer: optax.GradientTransformation,
    *,
    apply: Callable[[Params, Patch], Params] = patches.apply,
    over: tuple[str, ...] = (),
    batched: bool = False,
) -> Step:
    """Return `step(state, params, batch) -> (state, loss)`, pure: jit it, donate the state if you like.

    Args:
      loss_fn: the loss of ONE example, nats; a step descends its mean over the batch.
      optimizer: any optax transformation.
      apply: what a patch means; `patches.unfold`, with `leaves.interpret(loss_fn)`, trains scales and
        low-rank products without forming a patched weight or a gradient of its size.
      over: axes of the mesh over which the examples are spread; they join the constraints in `loss_fn`
        (`mesh.constrain`).
      batched: `loss_fn` is the loss of a whole batch (`legacy_tfew_loss`), in place of one example's.

    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> patch = {"w": patches.Sparse(jnp.array([1]), jnp.array([2.0]))}
    >>> optimizer = optax.sgd(0.25)
    >>> step = jax.jit(make_step(loss, optimizer))
    >>> state, value = step(init(patch, optimizer), {"w": jnp.array([0.0, 2.0])}, {"x": jnp.ones((4, 2))})
    >>> float(value), patch_of(state)["w"].values
    (4.0, Array([1.], dtype=float32))
    """

    def loss_of_batch(trainable, fixed, params, batch):
        return loss_fn(apply(params, patches.combine(trainable, fixed)), batch)

    loss_of = loss_of_batch if batched else mean_loss(loss_fn, apply, over)
    value_and_grad = jax.value_and_grad(loss_of)

    def step(state, params, batch):
        loss, grads = value_and_grad(state.trainable, state.fixed, params, batch)
        return advance(state, grads, optimizer), loss

    return step


def mean_loss(
    loss_fn: LossFn, apply: Callable[[Params, Patch], Params], over: tuple[str, ...] = ()
) -> Callable[..., Array]:
    """Return `loss(trainable, fixed, params, batch)`, the mean over a batch under a patch in two parts."""

    def loss(trainable, fixed, params, batch):
        patched = apply(params, patches.combine(trainable, fixed))
        return jax.vmap(loss_fn, (None, 0), spmd_axis_name=over or None)(patched, batch).mean()

    return loss


def advance(state: TrainState, grads: Patch, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state after one update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(trainable, state.fixed, opt_state, state.step + 1)
