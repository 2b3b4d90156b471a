"""Several patches trained at once: each example of a batch moves the patch of its own task."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishjax import patches
from fishjax.errors import StructureError
from fishjax.train._step import Step, TrainState, advance
from fishjax.types import Array, Batch, LossFn, Params


def make_mixed_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Step:
    """Return a step for patches side by side (`patches.stack`); a batch says in `task_ids` whose each is.

    One compiled program trains any mixture, and no weight is copied for an example. A task gets the mean
    of its examples' gradients times its share of the batch, so with Adam its share hardly matters.

    Args:
      loss_fn: the loss of ONE example, nats.
      optimizer: any optax transformation; a task without an example in a batch has the gradient 0.

    The batch has `task_ids`, int `[B]`, as of `patches.select`; out of range the loss is NaN.

    Raises:
      StructureError: when traced, if the batch has no `task_ids`.

    >>> from fishjax import train
    >>> loss = lambda params, example: jnp.sum(example["x"] @ params["w"])
    >>> patch = patches.stack([{"w": patches.Scale(jnp.ones((1, 1)))} for _ in range(2)])
    >>> state, step = train.init(patch, optax.sgd(1.0)), jax.jit(make_mixed_step(loss, optax.sgd(1.0)))
    >>> batch = {"x": jnp.array([[1.0], [2.0]]), "task_ids": jnp.array([1, 1])}
    >>> state, _ = step(state, {"w": jnp.ones((1, 1))}, batch)
    >>> [p["w"].vector.item() for p in patches.unstack(train.patch_of(state))]
    [1.0, -0.5]
    """
    each = patches.unfolded(jax.vmap(loss_fn, (None, 0)))

    def mean_loss(trainable, fixed, params, batch):
        if "task_ids" not in batch:
            raise StructureError(f"a batch of several tasks has `task_ids`; got {', '.join(sorted(batch))}")
        rest = {name: x for name, x in batch.items() if name != "task_ids"}
        stacked: Any = patches.combine(trainable, fixed)
        patch = patches.Selected(stacked, jnp.asarray(batch["task_ids"]))
        return each(params, patch, rest).mean()

    value_and_grad = jax.value_and_grad(mean_loss)

    def step(state: TrainState, params: Params, batch: Batch) -> tuple[TrainState, Array]:
        loss, grads = value_and_grad(state.trainable, state.fixed, params, batch)
        return advance(state, grads, optimizer), loss

    return step
