"""Weights in eight or four bits, with a scale for each group of entries along one axis.

`int8` and `int4` are multiples of the scale; `nf4` is a table of 16 values (QLoRA, arXiv 2305.14314,
appendix E) for weights that are normally distributed. On a CPU, XLA would copy a whole weight to floats
before a matmul, so products are formed piece by piece.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves._codec import FORMATS, decode, encode, near_divisor
from fishjax.leaves._interpreter import Equation, shape_of
from fishjax.leaves._structure import STRUCTURAL, Dims, Shape, is_row_take, only, to_float
from fishjax.types import Array

PIECE = 1 << 18  # entries of a weight that are floats at once: 1 MB, which a core's cache holds
SMALL = 1 << 12  # a weight of so few entries is formed whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """The weight `value(codes) * scales`, groups along one of its axes, which is kept last."""

    codes: Array  # int8 [*rest, M, group], or two codes a byte: uint8 [*rest, M, ceil(group / 2)]
    scales: Array  # [*rest, M] in max(float32, dtype)
    axis: int = dataclasses.field(metadata={"static": True})  # from the end: where the M groups lie
    group: int = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the weight that this stands for
    name: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The weight's shape."""
        *rest, groups = self.scales.shape
        rest.insert(len(rest) + 1 + self.axis, groups * self.group)
        return tuple(rest)

    @property
    def ndim(self) -> int:
        """The weight's rank."""
        return len(self.scales.shape)

    @property
    def size(self) -> int:
        """How many entries the weight has."""
        return self.scales.size * self.group

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales."""
        return self.codes.size * self.codes.dtype.itemsize + self.scales.size * self.scales.dtype.itemsize

    def materialise(self) -> Array:
        """Form the weight: one multiply in max(float32, dtype), one rounding."""
        values = decode(self.codes, self.format, self.group, self.scales.dtype)
        grouped = (values * self.scales[..., None]).astype(self.dtype)
        return jnp.moveaxis(grouped.reshape(*grouped.shape[:-2], -1), -1, self.axis)

    def stacked(self, length: int) -> Any:
        """Prepare for a scan over the leading axis; groups along that one are formed."""
        return self.materialise() if self.axis == -self.ndim else self

    def shardings(self, sharding: NamedSharding) -> "Quantised":
        """Return where codes and scales go if the weight goes there; groups stay whole, or the axis does."""
        entries = [*sharding.spec, *[None] * (self.ndim - len(sharding.spec))]
        last = entries.pop(self.ndim + self.axis)
        axes = () if last is None else (last,) if isinstance(last, str) else last
        divides = self.scales.shape[-1] % math.prod(sharding.mesh.shape[a] for a in axes) == 0
        entries.append(last if divides else None)
        where = lambda *more: NamedSharding(sharding.mesh, PartitionSpec(*entries, *more))
        return dataclasses.replace(self, codes=where(None), scales=where())

    @property
    def sharding(self) -> Any:
        """Where the weight would lie: undo `shardings`."""
        own = self.scales.sharding
        if not isinstance(own, NamedSharding):
            return own
        entries = [*own.spec, *[None] * (self.ndim - len(own.spec))]
        entries.insert(self.ndim + self.axis, entries.pop())
        return NamedSharding(own.mesh, PartitionSpec(*entries))

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Answer an equation; None where the weight has to be formed."""
        operands = equation.operands(values)
        if (at := only(operands, self)) is None:
            return None
        if equation.name in STRUCTURAL:
            return self._move(equation, operands)
        if equation.name == "convert_element_type" and to_float(equation):
            return [dataclasses.replace(self, dtype=equation.params["new_dtype"])]
        if equation.name == "dot_general":
            return [self._dot(equation.params, operands[1 - at], Dims.of(equation, at), at)]
        if is_row_take(equation) and self.axis != -self.ndim:
            return self._rows(equation, operands[1][..., 0])
        return None

    def _move(self, equation: Equation, operands: Any) -> list[Any] | None:
        """Move codes and scales as factors that do not depend on the axis of the groups."""
        rule, at, shape = STRUCTURAL[equation.name], self.ndim + self.axis, self.shape
        # Where that axis goes, and whether it stays whole, is seen from a factor that only it has.
        marker = jax.ShapeDtypeStruct([n if d == at else 1 for d, n in enumerate(shape)], bool)
        marked = jax.eval_shape(lambda m: rule(m, shape, equation.params, operands), marker)
        move = lambda x: rule(jnp.expand_dims(x, at), shape, equation.params, operands)
        all_codes, all_scales = move(self.codes), move(self.scales)
        if marked is None or all_codes is None or all_scales is None:
            return None
        outputs = []
        for mark, codes, scales, v in zip(marked, all_codes, all_scales, equation.eqn.outvars, strict=True):
            if shape[at] == 1 or [n for n in mark.shape if n != 1] != [shape[at]]:
                return None
            axis = mark.shape.index(shape[at])
            codes, scales = lax.squeeze(codes, (axis,)), lax.squeeze(scales, (axis,))
            leaf = dataclasses.replace(self, codes=codes, scales=scales, axis=axis - len(mark.shape))
            if leaf.shape != shape_of(v):  # an axis was broadcast
                return None
            outputs.append(leaf)
        return outputs

    def _rows(self, equation: Equation, ids: Array) -> list[Any] | None:
        """Look rows up and form these only."""
        mode = equation.params["mode"]
        fill = mode == lax.GatherScatterMode.FILL_OR_DROP
        if fill and not np.isnan(equation.params["fill_value"] or jnp.nan):
            return None
        take = partial(self.codes.at[ids].get, wrap_negative_indices=False)
        codes = take(mode="clip")
        scales = self.scales.at[ids].get(mode=mode, wrap_negative_indices=False, fill_value=jnp.nan)
        return [dataclasses.replace(self, codes=codes, scales=scales).materialise()]

    def _dot(self, params: dict, x: Array, dims: Dims, at: int) -> Array:
        """Form the weight piece by piece along one axis, and multiply by each piece as it is there."""
        ndim, grouped = self.ndim, self.ndim + self.axis
        contract, batch = (pair[at] for pair in params["dimension_numbers"])
        dtype = params["preferred_element_type"]
        others = [d for d in range(ndim) if d != grouped]
        free = [d for d in others if d not in contract]
        # What is contracted comes first: a product with one row is then one pass over the codes.
        order = [*contract, *(d for d in range(ndim) if d not in contract)]
        here = lambda axes: tuple(order.index(d) for d in axes)
        numbers = [[pair[0], pair[1]] for pair in params["dimension_numbers"]]
        numbers[0][at], numbers[1][at] = here(contract), here(batch)

        def product(leaf: Quantised, x: Array, dtype: Any) -> Array:
            w = leaf.materialise().transpose(order)
            left, right = (x, w) if at else (w, x)
            return lax.dot_general(
                left,
                right,
                (tuple(numbers[0]), tuple(numbers[1])),
                precision=params["precision"],
                preferred_element_type=dtype,
            )

        if self.size <= SMALL or not others:
            return product(self, x, dtype)
        cut = max(free or others, key=lambda d: self.shape[d])
        view = _View.of(self.shape[cut], near_divisor(self.shape[cut], max(4, self.size // PIECE)))
        stored, in_x, wide = cut - (cut > grouped), dims.to_x.get(cut), tree.wide_dtype(dtype or x.dtype)
        codes, scales = view.split(self.codes, stored), view.split(self.scales, stored)
        x = x if in_x is None else view.split(x, in_x)

        @partial(jax.checkpoint, prevent_cse=False)  # a backward pass that kept the pieces kept the weight
        def step(total: Any, i: Array) -> tuple[Any, Any]:
            own = view.take(codes, stored, i), view.take(scales, stored, i)
            piece = dataclasses.replace(self, codes=own[0], scales=own[1])
            part = x if in_x is None else view.take(x, in_x, i)
            if cut in contract:
                return total + product(piece, part, wide), None
            return total, product(piece, part, dtype)

        pieces = jnp.arange(view.pieces, dtype=jnp.int32)
        if cut not in contract:
            _, ys = lax.scan(step, None, pieces)
            return view.join(ys, dims.to_y[cut])
        like = jax.eval_shape(lambda: step(0, jnp.int32(0))[0])
        total, _ = lax.scan(step, jnp.zeros(like.shape, wide), pieces)
        return total.astype(dtype or x.dtype)


class _View(NamedTuple):
    """An axis as `[outer, pieces, inner]`: a mesh that divides `outer` holds its part of every piece."""

    outer: int
    pieces: int
    inner: int

    @staticmethod
    def of(n: int, pieces: int) -> "_View":
        each = n // pieces
        outer = max(d for d in range(1, min(each, 16) + 1) if each % d == 0)
        return _View(outer, pieces, each // outer)

    def split(self, x: Array, axis: int) -> Array:
        return x.reshape(*x.shape[:axis], *self, *x.shape[axis + 1 :])

    def take(self, x: Array, axis: int, i: Array) -> Array:
        x = lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def join(self, ys: Array, axis: int) -> Array:
        """Lay pieces `[pieces, ...]` out along an axis of a piece."""
        ys = ys.reshape(*ys.shape[: axis + 1], self.outer, self.inner, *ys.shape[axis + 2 :])
        ys = jnp.moveaxis(ys, 0, axis + 1)
        return ys.reshape(*ys.shape[:axis], -1, *ys.shape[axis + 3 :])


def quantised(
    w: Array, format: str = "int8", *, axis: int = -1, group: int | None = None, name: str = ""
) -> Quantised:
    """Return a weight in eight or four bits.

    Args:
      w: floating `[*p]`.
      format: "int8", "int4" or "nf4".
      axis: the one that a product contracts; groups lie along it.
      group: entries that share a scale; the divisor of the axis that comes nearest is taken. None: 128
        for int8 and 64 for four bits, so 0.258 and 0.141 of float32's bytes.

    Raises:
      UsageError: an unknown format, no floats, a group below 1.

    References: Dettmers et al. 2023, arXiv 2305.14314, section 3 (nf4).

    >>> w = quantised(jnp.array([[1.0, -2.0, 0.5, 0.0]]), "int8")
    >>> w.codes.tolist(), w.scales.shape
    ([[[64, -127, 32, 0]]], (1, 1))
    """
    if format not in FORMATS:
        raise UsageError(f"`format` must be one of {', '.join(FORMATS)}; got `{format}`")
    if not tree.is_inexact(w) or w.ndim == 0 or not -w.ndim <= axis < w.ndim or 0 in w.shape:
        raise UsageError(f"what is quantised is floating with an axis {axis}; got {tree.describe(w)}")
    if group is not None and group < 1:
        raise UsageError(f"`group` must be at least 1; got {group}")
    axis %= w.ndim
    group = near_divisor(w.shape[axis], group or FORMATS[format].group)
    codes, scales = encode(w, format, axis, group)
    return Quantised(codes, scales, axis - w.ndim, group, format, jnp.dtype(w.dtype), name)
