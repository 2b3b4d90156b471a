"""Workers that train one patch together: only its gradient is averaged at every step."""

from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fishjax import patches
from fishjax.errors import UsageError
from fishjax.train._step import Step, TrainState, advance, mean_loss
from fishjax.types import Array, Batch, LossFn, Params, Patch


def make_parallel_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = "data",
    apply: Callable[[Params, Patch], Params] = patches.apply,
) -> Step:
    """Return the step of `make_step` with the batch shared out over a mesh axis.

    Only the patch's gradient and the loss are all-reduced: k numbers for a mask that keeps k. (Under plain
    `jit` the compiler all-reduces the dense gradient and takes the k numbers from it.) Other axes of the
    mesh are left to the compiler, so parameters may be sharded over them.

    Args:
      loss_fn, optimizer, apply: as in `make_step`.
      mesh: the devices.
      axis: the axis of the mesh over which examples are shared out; its size must divide B.

    Raises:
      UsageError: no such axis, or (when traced) a B that it does not divide.

    >>> import jax.numpy as jnp
    >>> from fishjax import train
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> state = train.init({"w": patches.Sparse(jnp.array([1]), jnp.array([2.0]))}, optax.sgd(0.25))
    >>> step = jax.jit(make_parallel_step(loss, optax.sgd(0.25), mesh))
    >>> state, value = step(state, {"w": jnp.array([0.0, 2.0])}, {"x": jnp.ones((4, 2))})
    >>> float(value), state.trainable["w"].values
    (4.0, Array([1.], dtype=float32))
    """
    workers(mesh, axis)
    value_and_grad = jax.value_and_grad(mean_loss(loss_fn, apply))

    def gradient(trainable, fixed, params, batch):
        return jax.lax.pmean(value_and_grad(trainable, fixed, params, batch), axis)

    # Unchecked, each worker differentiates by itself and the mean is of the patch's gradient. Checked, the
    # sum over workers would be taken where the patch meets the weights, which is of the dense gradient.
    shared = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(P(), P(), P(), P(axis)),
        out_specs=P(),
        axis_names={axis},
        check_vma=False,
    )

    def step(state: TrainState, params: Params, batch: Batch) -> tuple[TrainState, Array]:
        check_batch(batch, mesh, axis, 1)
        loss, grads = shared(state.trainable, state.fixed, params, batch)
        return advance(state, grads, optimizer), loss

    return step


def workers(mesh: Mesh, axis: str) -> int:
    """Return how many workers there are along an axis."""
    if axis not in mesh.shape:
        raise UsageError(f"the mesh has no axis `{axis}`; it has {', '.join(f'`{a}`' for a in mesh.shape)}")
    return mesh.shape[axis]


def check_batch(batch: Batch, mesh: Mesh, axis: str, steps: int) -> None:
    """Raise unless a batch can be shared out equally."""
    size, parts = jax.tree.leaves(batch)[0].shape[0], mesh.shape[axis] * steps
    if size % parts:
        raise UsageError(
            f"a batch of {size} examples cannot be shared out in {parts} equal parts "
            f"({mesh.shape[axis]} along `{axis}`" + (f", {steps} steps each)" if steps > 1 else ")")
        )
