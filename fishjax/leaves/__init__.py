"""Parameters that are not arrays: leaves with rules of their own, and the interpreter that asks them.

interpret(fn)(params, ...)   any JAX function, unchanged, on params that hold leaves
Scaled, LowRank              weights kept as a base and small factors, never formed
Quantised, quantised(w)      weights in eight or four bits, formed piece by piece
quantise(params, to)         all matrices of a tree
materialised(fn)(...)        which leaves had to be formed after all, and why
"""

from collections.abc import Callable
from typing import Any

import jax

from fishjax.leaves._codec import FORMATS
from fishjax.leaves._factored import LowRank, Scaled
from fishjax.leaves._interpreter import (
    CALLS,
    Equation,
    OnMaterialise,
    Path,
    Traced,
    array,
    arrays_of,
    carry_out,
    enterable,
    equations,
    evaluate,
    inner_jaxpr,
    interpret,
    is_leaf,
    scan_parts,
    shape_of,
    trace,
)
from fishjax.leaves._quantise import quantise, quantiser
from fishjax.leaves._quantised import Quantised, quantised
from fishjax.leaves._structure import is_row_take, regroup

__all__ = [
    "CALLS",
    "FORMATS",
    "Equation",
    "LowRank",
    "OnMaterialise",
    "Path",
    "Quantised",
    "Scaled",
    "Traced",
    "array",
    "arrays_of",
    "carry_out",
    "enterable",
    "equations",
    "evaluate",
    "inner_jaxpr",
    "interpret",
    "is_leaf",
    "is_row_take",
    "materialised",
    "noted",
    "quantise",
    "quantised",
    "quantiser",
    "regroup",
    "scan_parts",
    "shape_of",
    "trace",
]


def materialised(fn: Callable[..., Any]) -> Callable[..., list[str]]:
    """Return a function of the same arguments that lists which leaves `interpret(fn)` forms, and for what.

    Nothing is computed: it is found by tracing.

    >>> import jax.numpy as jnp
    >>> w = Scaled(jnp.ones((2, 3)), jnp.ones((1, 3)), name="w")
    >>> materialised(lambda w, x: jnp.sum(x @ w) + jnp.sum(w))(w, jnp.ones(2))
    ['w: reduce_sum']
    """

    return lambda *args, **kwargs: noted(lambda note: interpret(fn, note)(*args, **kwargs))


def noted(run: Callable[[OnMaterialise], Any]) -> list[str]:
    """Trace `run(note)` and list what it says to its `note` of leaves that it materialises."""
    seen: list[str] = []

    def note(leaf, equation):
        seen.append(f"{leaf.name}: {equation.name}")

    jax.make_jaxpr(lambda: run(note))()
    return seen
