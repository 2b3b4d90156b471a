"""sum_i g_i^2, where g_i is example i's gradient of a weight through one use, added to a total."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from fishjax import tree
from fishjax.leaves import Equation, is_row_take, shape_of
from fishjax.types import Array

# How many numbers of per-example gradients are held at once. On a CPU a batched product of small
# matrices is slower than a loop over examples (4.4 s against 2.1 s on a MiniLM); an accelerator is idle
# in such a loop.
HELD = {"cpu": 2**16}
HELD_ELSEWHERE = 2**26


def over_rows(equation: Equation, at: Any, op: Callable, axes: tuple[int | None, ...]) -> Callable:
    """Return `(start, w, g, *xs) -> start + sum_i (J_i^T g_i)^2`, g having a leading axis of examples.

    Under a `vmap` over rows of g the result is the sum over the rows too, and has no mapped axis.
    """

    @custom_vmap
    def add(start, w, g, *xs):
        return add_squares(equation, at, op, start, w, xs, axes, [x[:, None] for x in g])

    @add.def_vmap
    def _(size, batched, start, w, g, *xs):
        if any(jax.tree.leaves([batched[:2], batched[3:]])):
            raise AssertionError("the forward pass is the same for all rows; please report this as a bug")
        rows = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(g, batched[2])]
        return add_squares(equation, at, op, start, w, xs, axes, [jnp.moveaxis(x, 0, 1) for x in rows]), False

    return add


def sum_rows(x: Array) -> Array:
    """Return x; under a `vmap` over rows its sum over them, without a mapped axis."""

    @custom_vmap
    def total(x):
        return x

    @total.def_vmap
    def _(size, batched, x):
        return (x.sum(0) if batched[0] else x), False

    return total(x)


def add_squares(equation: Equation, at: Any, op: Callable, start: Array, w: Array, xs, axes, g) -> Array:
    """Return `start + sum_i sum_k (J_i^T g_ik)^2`; J_i is of `w -> op(w, *xs_i)`.

    Args:
      equation: the equation that `op` carries out; None if `op` is the identity.
      at: the variable of the equation that stands for `w`.
      start: `[*p]`, in the dtype of the squares.
      w: `[*p]`.
      xs: the other operands, with a leading axis of examples where `axes` is 0 (else None).
      g: cotangents of the outputs, `[B, K, ...]`: K rows an example.
    """
    size, rows = jax.tree.leaves(g)[0].shape[:2]
    if equation is not None and is_row_take(equation) and equation.eqn.invars[0] is at and xs:
        ids = (jnp.broadcast_to(xs[0], (size, *xs[0].shape)) if axes[0] is None else xs[0]).reshape(size, -1)
        if rows_pay(ids.shape[1], w.shape[0]):
            ids = jnp.repeat(row_ids(ids, w.shape[0], equation.params["mode"]), rows, axis=0)
            return add_row_squares(start, ids, g[0].reshape(*ids.shape, -1))
    if equation is not None and is_one_product(equation, at):
        return start + _square_inputs(equation, at, start.dtype, w, xs, axes, g)

    one = of_one(op, start.dtype)

    def of_rows(g, *xs):
        if rows * w.size > held():  # few (`MOST_ROWS_AT_ONCE`); a batched matmul is slow on a CPU
            return functools.reduce(jnp.add, [one(w, [x[k] for x in g], *xs) for k in range(rows)])
        # Not unrolled: XLA fuses a sum of slices under a `vmap` into wrong numbers on a CPU (jaxlib 0.10.2).
        return jax.vmap(lambda g: one(w, g, *xs))(g).sum(0)

    return add_over_examples(of_rows, (0, *axes), size, rows * w.size)(start, g, *xs)


def of_one(op: Callable, dtype: Any) -> Callable:
    """Return `(w, g, *xs) -> (J^T g)^2` of one example in `dtype`, J being that of `w -> op(w, *xs)`."""

    def squared(w, g, *xs):
        _, pull = jax.vjp(lambda w: op(w, *xs), w)
        return jnp.square(pull(g)[0].astype(dtype))

    return squared


def square(gradient: Array) -> Array:
    """Return the square of a gradient, in max(float32, its dtype)."""
    return jnp.square(gradient.astype(tree.wide_dtype(gradient.dtype)))


def held() -> int:
    """Return how many numbers of gradients are best held at a time on this device."""
    return HELD.get(jax.default_backend(), HELD_ELSEWHERE)


def add_over_examples(fn: Callable, axes: tuple[int | None, ...], size: int, each: int) -> Callable:
    """Return `(start, *args) -> start + sum_i fn(i-th of args)`, as many at once as makes sense.

    Args:
      axes: 0 for arguments with a leading axis of `size` examples, None for the others.
      each: how many numbers are held for one example.
    """
    most = max(1, held() // each)
    group = next(n for n in range(min(size, most), 0, -1) if size % n == 0)

    def total(start, *args):
        if group == size:
            return start + jax.vmap(fn, axes)(*args).sum(0)
        cut = [
            jax.tree.map(lambda y: y.reshape(-1, group, *y.shape[1:]), x) if a == 0 else None
            for x, a in zip(args, axes)
        ]

        def step(carry, cut):
            part = [x if a is None else c for x, c, a in zip(args, cut, axes)]
            if group == 1:
                first = [x if a is None else jax.tree.map(lambda y: y[0], x) for x, a in zip(part, axes)]
                return carry + fn(*first), None
            return carry + jax.vmap(fn, axes)(*part).sum(0), None

        return lax.scan(step, start, cut)[0]

    return total


def is_one_product(equation: Equation, at: Any) -> bool:
    """Say whether a matmul's weight gradient is one product an entry, without a sum over tokens."""
    if equation.name != "dot_general" or equation.eqn.invars.count(at) != 1:
        return False
    side = equation.eqn.invars.index(at)
    contract, batch = equation.params["dimension_numbers"]
    shape = shape_of(equation.eqn.invars[1 - side])
    taken = (*contract[1 - side], *batch[1 - side])
    return all(n == 1 for d, n in enumerate(shape) if d not in taken)


def _square_inputs(equation, at, dtype, w, xs, axes, g):
    """sum_i (x_i g_i)^2 = sum_i x_i^2 g_i^2: one matmul of squares."""
    side = equation.eqn.invars.index(at)
    params, size = equation.params, g[0].shape[0]

    def squared(x):
        return jnp.square(x.astype(dtype))

    def product(w, x):
        pair = (w, x) if side == 0 else (x, w)
        numbers, precision = params["dimension_numbers"], params["precision"]
        return lax.dot_general(*pair, numbers, precision=precision, preferred_element_type=dtype)

    (x,) = xs if xs else (jnp.asarray(equation.eqn.invars[1 - side].val),)
    axis = axes[0] if axes else None
    _, pull = jax.vjp(
        lambda w: jax.vmap(product, (None, axis), axis_size=size)(w, squared(x)), w.astype(dtype)
    )
    return pull(squared(g[0]).sum(1))[0]


def rows_pay(lookups: int, num_rows: int) -> bool:
    """Say whether squares of row lookups are cheaper row by row than in a whole table for each example."""
    return lookups**2 <= 16 * num_rows


def row_ids(ids: Array, num_rows: int, mode: Any) -> Array:
    """Return the rows that a gather really takes; `num_rows`, which is no row, for one that it drops."""
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        ids = jnp.where((ids >= 0) & (ids < num_rows), ids, num_rows)
    else:
        ids = jnp.clip(ids, 0, num_rows - 1)
    return ids.astype(jnp.int32)


def add_row_squares(start: Array, ids: Array, g: Array) -> Array:
    """Add the squares of looked-up rows; a row that one example takes twice adds up first.

    Args:
      start: `[V, *rest]`, in the dtype of the squares.
      ids: int `[B, N]`, as from `row_ids`.
      g: cotangents of the rows, `[B, N, rest]`.
    """
    same = ids[:, :, None] == ids[:, None, :]
    rows = jnp.einsum("bnm,bmd->bnd", same.astype(start.dtype), g.astype(start.dtype), precision="highest")
    is_first = ~jnp.any(same & jnp.tri(ids.shape[1], k=-1, dtype=bool)[None], axis=2)
    squares = jnp.where(is_first[:, :, None], jnp.square(rows), 0).reshape(-1, rows.shape[-1])
    table = start.reshape(start.shape[0], rows.shape[-1])
    return table.at[ids.reshape(-1)].add(squares, mode="drop").reshape(start.shape)
