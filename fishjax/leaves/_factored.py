"""Weights that are kept as a base and small factors: scaled (IA)^3 weights and low-rank (LoRA) ones.

The factors have the weight's own rank, 1 on the axes that they do not depend on. What a layer does to
a weight before its matmul (cast, transpose, reshape, slice, ...) is then one map over base and factors,
and the weight itself is never formed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fishjax import tree
from fishjax.leaves._interpreter import Equation, shape_of
from fishjax.types import Array

Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """The weight `w * scale`."""

    w: Array  # [*p]
    scale: Array  # the rank of `w`, 1 on the axes that are not scaled
    name: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The weight's shape."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.w.dtype

    def materialise(self) -> Array:
        """Form the weight: one multiply in max(float32, dtype), one rounding."""
        wide = tree.wide_dtype(self.w.dtype)
        return (self.w.astype(wide) * self.scale.astype(wide)).astype(self.w.dtype)

    def stacked(self, length: int) -> "Scaled":
        """Give the factor a leading axis of its own, for a scan over the weight's."""
        return dataclasses.replace(self, scale=_lead(self.scale, length))

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Answer an equation; None where the weight has to be formed."""
        operands = equation.operands(values)
        if (at := _only(operands, self)) is None:
            return None
        if equation.name in _STRUCTURAL:
            scale = _STRUCTURAL[equation.name](self.scale, self.shape, equation.params, operands)
            if scale is None:
                return None
            bases = equation.bind({**values, variable: self.w})
            return [dataclasses.replace(self, w=w, scale=s) for w, s in zip(bases, scale)]
        if equation.name == "convert_element_type" and _to_float(equation):
            return [dataclasses.replace(self, w=equation.bind({**values, variable: self.w})[0])]
        if equation.name == "dot_general":
            return self._dot(equation, operands, values, variable, at)
        if is_row_take(equation):
            ids = operands[1][..., 0]
            return [_times(equation.bind({**values, variable: self.w})[0], _rows(self.scale, ids))]
        return None

    def _dot(self, equation, operands, values, variable, at):
        x, dims = operands[1 - at], _Dims.of(equation, at)
        full = {d for d, n in enumerate(self.scale.shape) if n != 1}
        values = {**values, variable: self.w}
        if full <= set(dims.to_x):  # contracted axes: scale what comes in
            x = _times(x, _spread(self.scale, dims.to_x, x.ndim))
            other = equation.eqn.invars[1 - at]
            if not hasattr(other, "val"):
                return equation.bind({**values, other: x})
            return None
        if full <= set(dims.to_y):  # free axes: scale what goes out
            (y,) = equation.bind(values)
            return [_times(y, _spread(self.scale, dims.to_y, y.ndim))]
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The weight `w + scale * sum_r a * b`."""

    w: Array  # [*p]
    a: Array  # the rank of `w`, 1 on the axes that it does not depend on, and a trailing r
    b: Array  # likewise
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The weight's shape."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.w.dtype

    def materialise(self) -> Array:
        """Form the weight: one addition in max(float32, dtype), one rounding."""
        wide = tree.wide_dtype(self.w.dtype)
        letters = [_letter(d) for d in range(self.w.ndim)]
        delta = _einsum([(self.a, [*letters, "r"]), (self.b, [*letters, "r"])], letters, wide)
        return (self.w.astype(wide) + self.scale * delta).astype(self.w.dtype)

    def stacked(self, length: int) -> "LowRank":
        """Give the factors a leading axis of their own, for a scan over the weight's."""
        return dataclasses.replace(self, a=_lead(self.a, length), b=_lead(self.b, length))

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Answer an equation; None where the weight has to be formed."""
        operands = equation.operands(values)
        if (at := _only(operands, self)) is None:
            return None
        if equation.name in _STRUCTURAL:
            rule = _STRUCTURAL[equation.name]
            a = rule(self.a, self.shape, equation.params, operands)
            b = rule(self.b, self.shape, equation.params, operands)
            if a is None or b is None:
                return None
            bases = equation.bind({**values, variable: self.w})
            return [dataclasses.replace(self, w=w, a=a, b=b) for w, a, b in zip(bases, a, b)]
        if equation.name == "convert_element_type" and _to_float(equation):
            return [dataclasses.replace(self, w=equation.bind({**values, variable: self.w})[0])]
        if equation.name == "dot_general":
            return self._dot(equation, operands[1 - at], values, variable, at)
        if is_row_take(equation):
            ids = operands[1][..., 0]
            (y,) = equation.bind({**values, variable: self.w})
            letters = [_letter(d) for d in range(y.ndim)]
            rows = [(_rows(f, ids), [*letters, "r"]) for f in (self.a, self.b)]
            return [_plus(y, self.scale * _einsum(rows, letters, tree.wide_dtype(y.dtype)))]
        return None

    def _dot(self, equation, x, values, variable, at):
        """Add `(x a) b` to the base's product; einsum finds the order, whatever is contracted."""
        dims = _Dims.of(equation, at)
        (y,) = equation.bind({**values, variable: self.w})
        of_x = [f"x{d}" for d in range(x.ndim)]
        of_w = [f"w{d}" for d in range(self.w.ndim)]
        for d, e in dims.to_x.items():
            of_w[d] = of_x[e]
        of_y = [""] * y.ndim
        for d, e in dims.to_y.items():
            of_y[e] = of_w[d]
        for d, e in dims.x_to_y.items():
            of_y[e] = of_x[d]
        a, b = (f.astype(x.dtype) for f in (self.a, self.b))
        operands = [(x, of_x), (a, [*of_w, "r"]), (b, [*of_w, "r"])]
        delta = _einsum(operands, of_y, tree.wide_dtype(x.dtype), equation.params["precision"])
        return [_plus(y, self.scale * delta)]


@dataclasses.dataclass(frozen=True)
class _Dims:
    """Where the axes of a dot_general's weight and of its other operand x go."""

    to_x: dict[int, int]  # contracted and batch axes of w -> axes of x
    to_y: dict[int, int]  # free and batch axes of w -> axes of the result
    x_to_y: dict[int, int]  # free and batch axes of x -> axes of the result

    @staticmethod
    def of(equation: Equation, at: int) -> "_Dims":
        contract, batch = equation.params["dimension_numbers"]
        ndims = [len(shape_of(v)) for v in equation.eqn.invars]
        free = [[d for d in range(ndims[s]) if d not in (*contract[s], *batch[s])] for s in (0, 1)]
        ends = [
            {d: i for i, d in enumerate([*batch[0], *free[0]])},
            {d: i + (len(free[0]) if i >= len(batch[1]) else 0) for i, d in enumerate([*batch[1], *free[1]])},
        ]
        pairs = dict(zip((*contract[at], *batch[at]), (*contract[1 - at], *batch[1 - at]), strict=True))
        return _Dims(pairs, ends[at], ends[1 - at])


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


_STRUCTURAL: dict[str, Callable[..., list[Array] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
}


def _only(operands: Sequence[Any], leaf: Any) -> int | None:
    """Return the leaf's one position, or None if it stands in several."""
    places = [i for i, x in enumerate(operands) if x is leaf]
    return places[0] if len(places) == 1 else None


def _to_float(equation: Equation) -> bool:
    return jnp.issubdtype(equation.params["new_dtype"], jnp.floating)


def _lead(factor: Array, length: int) -> Array:
    return jnp.broadcast_to(factor, (length, *factor.shape[1:]))


def _spread(factor: Array, to: dict[int, int], ndim: int) -> Array:
    """Lay the axes of a factor that are not 1 out over the axes of another array."""
    axes = sorted((to[d], d) for d, n in enumerate(factor.shape) if n != 1)
    order = [d for _, d in axes] + [d for d, n in enumerate(factor.shape) if n == 1]
    sizes = [1] * ndim
    for e, d in axes:
        sizes[e] = factor.shape[d]
    return factor.transpose(order).reshape(sizes)


def _times(x: Array, factor: Array) -> Array:
    wide = tree.wide_dtype(x.dtype)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def _plus(y: Array, delta: Array) -> Array:
    wide = tree.wide_dtype(y.dtype)
    return (y.astype(wide) + delta.astype(wide)).astype(y.dtype)


def _rows(factor: Array, ids: Array) -> Array:
    """Take rows of a factor; one that does not depend on the row is the same for all."""
    if factor.shape[0] != 1:
        return factor.at[ids].get(mode="clip")
    return factor.reshape((1,) * ids.ndim + factor.shape[1:])


def _letter(d: int) -> str:
    return f"w{d}"


def _einsum(operands, result: Sequence[str], dtype, precision=None) -> Array:
    """Multiply arrays with named axes, an axis of size 1 standing for none; the result keeps its rank."""
    number = {name: i for i, name in enumerate(dict.fromkeys(n for _, names in operands for n in names))}
    args: list[Any] = []
    there = set()
    for x, names in operands:
        kept = [d for d, n in enumerate(x.shape) if n != 1 or names[d] == "r"]
        args += [x.reshape([x.shape[d] for d in kept]), [number[names[d]] for d in kept]]
        there |= {names[d] for d in kept}
    out = [n for n in result if n in there]
    y = jnp.einsum(*args, [number[n] for n in out], precision=precision, preferred_element_type=dtype)
    sizes = iter(y.shape)
    return y.reshape([next(sizes) if n in there else 1 for n in result])
