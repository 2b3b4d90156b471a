"""What a merge method is: a rule for one block of entries, and the arguments that all rules share.

A rule sees the same entries of one leaf in every model, widened to max(float32, dtype), and returns
the merged entries in that dtype; whoever calls it rounds once. It is written against the array API
with sequential sums, so numpy and jax run the same lines, whole or in pieces.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fishjax.errors import UsageError
from fishjax.types import Array


class Block(NamedTuple):
    """The same entries of one leaf in every model, in max(float32, dtype)."""

    models: Sequence[Array]
    base: Array | None = None
    fishers: Sequence[Array] = ()


class Rule(NamedTuple):
    """A merge method: what happens to one block, and what it needs beside the models."""

    leaf: Callable[..., Array]  # (block, **options) -> merged entries
    needs_base: bool = False
    needs_fishers: bool = False


def wide(dtype: Any) -> np.dtype:
    """Return the dtype in which entries are accumulated: max(float32, dtype)."""
    return np.result_type(dtype, np.float32)


def is_inexact(dtype: Any) -> bool:
    """Say whether a dtype is floating or complex, bfloat16 and float8 included, without jax."""
    if np.dtype(dtype).kind in "fc":
        return True
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


def is_traced(x: Any) -> bool:
    """Say whether a value is only known when a compiled function runs, so that it cannot be checked."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def check_weights(weights: Any, n: int, *, zero_sum: bool = False) -> list[Any]:
    """Return n weights as floats (traced ones as scalars), 1 each where none are given.

    Args:
      weights: n finite numbers, or None.
      zero_sum: whether they may add up to nothing (they are then not divided by).

    Raises:
      UsageError: their number is wrong, one is not finite, or they sum to zero.
    """
    if weights is None:
        return [1.0] * n
    if is_traced(weights):
        if weights.shape != (n,):
            raise UsageError(
                f"`weights` must be one number for each of the {n} models; got shape {weights.shape}"
            )
        return [weights[i] for i in range(n)]
    given = list(weights) if np.ndim(weights) or isinstance(weights, (list, tuple)) else [weights]
    if len(given) != n:
        raise UsageError(f"`weights` must be one number for each of the {n} models; got {len(given)}")
    if any(is_traced(w) for w in given):
        return given
    numbers = [float(w) for w in given]
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"`weights` must be finite; got {numbers}")
    if not zero_sum and math.fsum(numbers) == 0:
        raise UsageError(f"`weights` must not sum to zero; got {numbers}")
    return numbers


def times(weight: Any, x: Array) -> Array:
    """Return weight * x in the dtype of x; a weight of exactly one costs nothing."""
    if isinstance(weight, float):
        return x if weight == 1.0 else x * weight
    return x * weight.astype(x.dtype)


def add_up(terms: Sequence[Any]) -> Any:
    """Add terms one after the other: the order is part of the result."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
