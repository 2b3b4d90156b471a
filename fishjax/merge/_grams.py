"""Gram matrices of what weights meet, for RegMean: the weights watch, the model's code stays as it is."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves import Equation, interpret
from fishjax.merge._rule import is_traced
from fishjax.types import Array, Batch, Params

_STRUCTURAL = ("transpose", "convert_element_type", "copy")


def grams(
    fn: Callable[[Params, Batch], Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "",
) -> dict[str, np.ndarray]:
    """Return, for every weight with two or more axes, the sum of x x^T over the inputs x of its matmuls.

    Args:
      fn: (params, batch) -> anything that depends on the model's outputs; any JAX function. It is run
        without an outer `jit`. Only what its result depends on is seen.
      params: the model, any pytree.
      batches: what it is run on. Every row counts: leave padding out.
      targets: regexes of leaf names; by default all.

    Returns:
      `{name: [n, n]}` in float64. Embedding tables and weights that meet no input with a single
      contracted axis have none.

    Raises:
      UsageError: a weight is used inside a scan, remat or cond; no batch is given.

    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    >>> apply = lambda p, x: x @ p["w"] + p["b"]
    >>> grams(apply, params, [jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]])])["w"]
    array([[1., 2.],
           [2., 5.]])
    """
    flat = tree.flatten(params)
    wanted = {n for n in tree.select(targets, flat) if flat[n].ndim >= 2 and tree.is_inexact(flat[n])}
    sink = _Sink({})
    watched = tree.rebuild(
        params, {n: _Watched(jnp.asarray(x), n, sink) if n in wanted else x for n, x in flat.items()}
    )
    seen = False
    for batch in batches:
        interpret(fn)(watched, batch)
        seen = True
    if not seen:
        raise UsageError("`batches` must hold at least one batch; got none")
    return sink.sums


@dataclasses.dataclass(eq=False)
class _Sink:
    """Where weights leave what they saw; one is like no other."""

    sums: dict[str, np.ndarray]

    def add(self, name: str, x: Array, axis: int) -> None:
        if is_traced(x):
            raise UsageError(
                f"`{name}` is used inside a scan, remat, cond or an outer `jit`, where its inputs cannot be "
                "watched; unroll the layers, or leave it out by `targets`"
            )
        rows = jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(tree.wide_dtype(x.dtype))
        gram = np.asarray(jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST), np.float64)
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched:
    """A weight that notes the inputs of its matmuls and is otherwise itself."""

    w: Array
    name: str = dataclasses.field(metadata={"static": True})
    sink: _Sink = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def materialise(self) -> Array:
        return self.w

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any] | None:
        """Note the other operand of a matmul; nothing is answered in the weight's place."""
        if equation.name in _STRUCTURAL:
            return [dataclasses.replace(self, w=equation.bind({**values, variable: self.w})[0])]
        if equation.name == "dot_general":
            operands = equation.operands(values)
            contract, batch = equation.params["dimension_numbers"]
            at = next(i for i, x in enumerate(operands) if x is self)
            other = operands[1 - at]
            if other is not self and not batch[at] and len(contract[at]) == 1:
                self.sink.add(self.name, other, contract[1 - at][0])
        return None
