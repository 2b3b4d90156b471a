"""What the equations that only move the entries of an array do to a factor that is broadcast over it."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from fishjax.leaves._interpreter import Equation, shape_of
from fishjax.types import Array

Shape = tuple[int, ...]


def is_row_take(equation: Equation) -> bool:
    """Say whether an equation looks up whole rows of its first operand, the rows' axes coming last."""
    if equation.name != "gather":
        return False
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, result = shape_of(equation.eqn.invars[0]), shape_of(equation.eqn.outvars[0])
    rest = len(shape) - 1
    return (
        tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(len(result) - rest, len(result)))
        and tuple(sizes) == (1, *shape[1:])
    )


def regroup(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Divide the axes of a reshape into the smallest groups of equal size.

    >>> [(list(a), list(b)) for a, b in regroup((6, 4, 5), (2, 3, 20))]
    [([0], [0, 1]), ([1, 2], [2])]
    """
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        m, i = (old[i], i + 1) if i < len(old) else (1, i)
        n, j = (new[j], j + 1) if j < len(new) else (1, j)
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


# Structural rules: (factor, shape of the weight, params, operands) -> the factor of each output, or
# None. The factor may have a trailing axis of ranks, which every rule carries along.


def _transpose(factor, shape, params, operands):
    permutation = tuple(params["permutation"])
    return [factor.transpose(*permutation, *range(len(shape), factor.ndim))]


def _reshape(factor, shape, params, operands):
    if params["dimensions"] is not None or 0 in shape:
        return None
    sizes = []
    for before, after in regroup(shape, tuple(params["new_sizes"])):
        mine = [factor.shape[d] for d in before]
        if all(n == 1 for n in mine):
            sizes += [1] * len(after)
        elif mine == [shape[d] for d in before]:
            sizes += [params["new_sizes"][d] for d in after]
        else:
            return None
    return [factor.reshape(*sizes, *factor.shape[len(shape) :])]


def _squeeze(factor, shape, params, operands):
    return [lax.squeeze(factor, tuple(d % len(shape) for d in params["dimensions"]))]


def _broadcast(factor, shape, params, operands):
    ndim, dims = len(params["shape"]), params["broadcast_dimensions"]
    sizes = [1] * ndim
    for d, e in enumerate(dims):
        sizes[e] = factor.shape[d]
    return [factor.reshape(*sizes, *factor.shape[len(shape) :])]


def _slice(factor, shape, params, operands):
    strides = params["strides"] or (1,) * len(shape)
    index = [
        slice(None) if factor.shape[d] == 1 else slice(start, stop, step)
        for d, (start, stop, step) in enumerate(
            zip(params["start_indices"], params["limit_indices"], strides)
        )
    ]
    return [factor[tuple(index)]]


def _split(factor, shape, params, operands):
    axis, sizes = params["axis"], params["sizes"]
    if factor.shape[axis] == 1:
        return [factor] * len(sizes)
    return list(jnp.split(factor, np.cumsum(sizes)[:-1].tolist(), axis))


def _dynamic_slice(factor, shape, params, operands):
    starts = list(operands[1:])
    zero = jnp.zeros_like(starts[0]) if starts else 0
    mine = [s if factor.shape[d] != 1 else zero for d, s in enumerate(starts)]
    sizes = [n if factor.shape[d] != 1 else 1 for d, n in enumerate(params["slice_sizes"])]
    tail = factor.shape[len(shape) :]
    return [lax.dynamic_slice(factor, [*mine, *[zero] * len(tail)], [*sizes, *tail])]


STRUCTURAL: dict[str, Callable[..., list[Array] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
}
