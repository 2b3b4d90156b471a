"""Weights that are kept as a base and small factors: scaled (IA)^3 weights and low-rank (LoRA) ones.

The factors have the weight's own rank, 1 on the axes that they do not depend on. What a layer does to
a weight before its matmul (cast, transpose, reshape, slice, ...) is then one map over base and factors,
and the weight itself is never formed. The base may be a leaf too: a sum of patches is leaf upon leaf.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.leaves._interpreter import Equation, array, carry_out
from fishjax.leaves._structure import STRUCTURAL, Dims, Shape, is_row_take, only, to_float
from fishjax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """The weight `w * scale`."""

    w: Any  # [*p], an array or a leaf
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
        return (array(self.w).astype(wide) * self.scale.astype(wide)).astype(self.w.dtype)

    def stacked(self, length: int) -> "Scaled":
        """Give the factor a leading axis of its own, for a scan over the weight's."""
        return dataclasses.replace(self, w=_stacked(self.w, length), scale=_lead(self.scale, length))

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Answer an equation; None where the weight has to be formed."""
        operands = equation.operands(values)
        if (at := only(operands, self)) is None:
            return None
        if equation.name in STRUCTURAL:
            scale = STRUCTURAL[equation.name](self.scale, self.shape, equation.params, operands)
            if scale is None or (bases := carry_out(equation, values, variable, self.w)) is None:
                return None
            return [dataclasses.replace(self, w=w, scale=s) for w, s in zip(bases, scale)]
        if equation.name == "dot_general":
            return self._dot(equation, operands, values, variable, at)
        cast = equation.name == "convert_element_type" and to_float(equation)
        if not (cast or is_row_take(equation)):
            return None
        if (bases := carry_out(equation, values, variable, self.w)) is None:
            return None
        if cast:
            return [dataclasses.replace(self, w=bases[0])]
        return [_times(bases[0], _rows(self.scale, operands[1][..., 0]))]

    def _dot(self, equation, operands, values, variable, at):
        x, dims = operands[1 - at], Dims.of(equation, at)
        full = {d for d, n in enumerate(self.scale.shape) if n != 1}
        other = equation.eqn.invars[1 - at]
        if full <= set(dims.to_x) and not hasattr(other, "val"):  # contracted axes: scale what comes in
            x = _times(x, _spread(self.scale, dims.to_x, x.ndim))
            return carry_out(equation, {**values, other: x}, variable, self.w)
        if full <= set(dims.to_y):  # free axes: scale what goes out
            out = carry_out(equation, values, variable, self.w)
            return out and [_times(y, _spread(self.scale, dims.to_y, y.ndim)) for y in out]
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The weight `w + scale * sum_r a * b`."""

    w: Any  # [*p], an array or a leaf
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
        letters = [_letter(d) for d in range(len(self.shape))]
        delta = _einsum([(self.a, [*letters, "r"]), (self.b, [*letters, "r"])], letters, wide)
        return (array(self.w).astype(wide) + self.scale * delta).astype(self.w.dtype)

    def stacked(self, length: int) -> "LowRank":
        """Give the factors a leading axis of their own, for a scan over the weight's."""
        a, b = _lead(self.a, length), _lead(self.b, length)
        return dataclasses.replace(self, w=_stacked(self.w, length), a=a, b=b)

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Answer an equation; None where the weight has to be formed."""
        operands = equation.operands(values)
        if (at := only(operands, self)) is None:
            return None
        if equation.name in STRUCTURAL:
            rule = STRUCTURAL[equation.name]
            a = rule(self.a, self.shape, equation.params, operands)
            b = rule(self.b, self.shape, equation.params, operands)
            if a is None or b is None or (bases := carry_out(equation, values, variable, self.w)) is None:
                return None
            return [dataclasses.replace(self, w=w, a=a, b=b) for w, a, b in zip(bases, a, b)]
        cast = equation.name == "convert_element_type" and to_float(equation)
        if not (cast or equation.name == "dot_general" or is_row_take(equation)):
            return None
        if (bases := carry_out(equation, values, variable, self.w)) is None:
            return None
        if cast:
            return [dataclasses.replace(self, w=bases[0])]
        if equation.name == "dot_general":
            return [self._dot(equation, operands[1 - at], at, *bases)]
        (y,), ids = bases, operands[1][..., 0]
        letters = [_letter(d) for d in range(y.ndim)]
        rows = [(_rows(f, ids), [*letters, "r"]) for f in (self.a, self.b)]
        return [_plus(y, self.scale * _einsum(rows, letters, tree.wide_dtype(y.dtype)))]

    def _dot(self, equation, x, at, y):
        """Add `(x a) b` to the base's product y; einsum finds the order, whatever is contracted."""
        dims = Dims.of(equation, at)
        of_x = [f"x{d}" for d in range(x.ndim)]
        of_w = [f"w{d}" for d in range(len(self.shape))]
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
        return _plus(y, self.scale * delta)


def _stacked(w: Any, length: int) -> Any:
    return w.stacked(length) if hasattr(w, "stacked") else w


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
        return jnp.asarray(factor).at[ids].get(mode="clip")  # a patch from a file holds numpy arrays
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
