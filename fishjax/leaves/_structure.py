"""What is known of an equation that meets a weight: what it does to a factor, where its axes go."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fishjax.leaves._interpreter import Equation, shape_of
from fishjax.types import Array

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dims:
    """Where the axes of a dot_general's weight and of its other operand x go."""

    to_x: dict[int, int]  # contracted and batch axes of w -> axes of x
    to_y: dict[int, int]  # free and batch axes of w -> axes of the result
    x_to_y: dict[int, int]  # free and batch axes of x -> axes of the result

    @staticmethod
    def of(equation: Equation, at: int) -> "Dims":
        """Read them off an equation whose operand `at` is the weight."""
        contract, batch = equation.params["dimension_numbers"]
        ndims = [len(shape_of(v)) for v in equation.eqn.invars]
        free = [[d for d in range(ndims[s]) if d not in (*contract[s], *batch[s])] for s in (0, 1)]
        ends = [
            {d: i for i, d in enumerate([*batch[0], *free[0]])},
            {d: i + (len(free[0]) if i >= len(batch[1]) else 0) for i, d in enumerate([*batch[1], *free[1]])},
        ]
        pairs = dict(zip((*contract[at], *batch[at]), (*contract[1 - at], *batch[1 - at]), strict=True))
        return Dims(pairs, ends[at], ends[1 - at])


def only(operands: Sequence[Any], leaf: Any) -> int | None:
    """Return the leaf's one position, or None if it stands in several."""
    places = [i for i, x in enumerate(operands) if x is leaf]
    return places[0] if len(places) == 1 else None


def to_float(equation: Equation) -> bool:
    """Say whether a convert_element_type is to floats."""
    return jnp.issubdtype(equation.params["new_dtype"], jnp.floating)


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
