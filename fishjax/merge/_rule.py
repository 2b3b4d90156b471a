"""What a merge method is: a rule for one block of entries, and the arguments that many rules share.

A rule sees the same entries of one leaf in every model, widened to max(float32, dtype), and returns
the merged entries in that dtype; whoever calls it rounds once. It is written against the array API
with sequential sums, so numpy and jax run the same lines, whole or in pieces. What an entry must know
of the others (a norm, a threshold) is measured beforehand: `sums` or `ranks` name the terms, the
engine adds or ranks them over a leaf or, where `scope` is "global", over all leaves.
"""

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fishjax.errors import UsageError
from fishjax.types import Array

Options = dict[str, Any]


class Block(NamedTuple):
    """The same entries of one leaf in every model, in max(float32, dtype)."""

    name: str
    models: Sequence[Array]
    base: Array | None = None
    beside: Mapping[str, Sequence[Array]] = {}  # what lies beside the models, such as their "fishers"
    positions: Array | None = None  # flat positions of the entries, unsigned, for rules with randomness
    measured: Sequence[Any] = ()  # what `sums` or `ranks` came to


class Rule(NamedTuple):
    """A merge method: what happens to one block, and what it needs for that."""

    leaf: Callable[..., Array]  # (block, **options) -> merged entries
    check: Callable[..., Options]  # (number of models, **options) -> options fit for the others
    needs_base: bool = False
    beside: tuple[str, ...] = ()  # arguments that hold trees beside the models, entries >= 0: "fishers"
    sums: Callable[..., Sequence[Array]] | None = None  # (block, **options) -> terms to be added up
    ranks: Callable[..., Sequence[Array]] | None = None  # (block, **options) -> arrays >= 0 to be ranked
    counts: Callable[..., Sequence[Sequence[int]]] | None = None  # (n, **options) -> for each array, k's:
    #   measured is then, for each array and k, the k-th largest value
    scope: str = "tensor"  # or "global"; an option of this name goes first
    random: bool = False  # whether blocks carry their positions


def wants_sums(rule: Rule, models: int, beside: Mapping[str, int], options: Mapping[str, Any]) -> bool:
    """Say whether a rule asks for any sums under some options."""
    none = np.zeros(0)
    near = {word: [none] * n for word, n in beside.items()}
    block = Block("", [none] * models, none, near, none.astype(np.uint32))
    return rule.sums is not None and len(rule.sums(block, **options)) > 0


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


def check_weights(weights: Any, n: int, *, zero_sum: bool = False, negative: bool = True) -> list[Any]:
    """Return n weights as floats (traced ones as scalars), 1 each where none are given.

    Args:
      weights: n finite numbers, or None.
      zero_sum: whether they may add up to nothing (they are then not divided by).
      negative: whether one may be below zero.

    Raises:
      UsageError: their number is wrong, one is not finite or not allowed, or they sum to zero.
    """
    if weights is None:
        return [1.0] * n
    if is_traced(weights):
        if weights.shape != (n,):
            raise UsageError(f"`weights` must be one for each of the {n} models; got shape {weights.shape}")
        return [weights[i] for i in range(n)]
    given = _listed(weights) or [weights]
    if len(given) != n:
        raise UsageError(f"`weights` must be one for each of the {n} models; got {len(given)}")
    if any(is_traced(w) for w in given):
        return given
    numbers = [number("weights", w) for w in given]
    if not negative and min(numbers) < 0:
        raise UsageError(f"`weights` must be >= 0 here; got {numbers}")
    if not zero_sum and math.fsum(numbers) == 0:
        raise UsageError(f"`weights` must not sum to zero; got {numbers}")
    return numbers


def number(name: str, x: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a finite float in [low, high], or a traced scalar as it is.

    Raises:
      UsageError: it is something else.
    """
    if is_traced(x):
        return x
    if _is_bool(x):
        raise UsageError(f"`{name}` must be a number; got {x!r}")
    try:
        value = float(x)
    except (TypeError, ValueError):
        raise UsageError(f"`{name}` must be a number; got {x!r}") from None
    except OverflowError:
        raise UsageError(f"`{name}` must be a finite number; got an integer beyond all floats") from None
    if not math.isfinite(value) or not low <= value <= high:
        span = "" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]"
        raise UsageError(f"`{name}` must be a finite number{span}; got {value}")
    return value


def numbers(name: str, x: Any, n: int, low: float, high: float) -> list[float]:
    """Return n numbers in [low, high] from one number or n of them."""
    given = _listed(x) or [x] * n
    if len(given) != n:
        raise UsageError(f"`{name}` must be one number, or one for each of the {n} models; got {len(given)}")
    return [number(name, v, low, high) for v in given]


def whole_number(name: str, x: Any) -> int:
    """Return an integer.

    Raises:
      UsageError: it is something else.
    """
    try:
        if not _is_bool(x):
            return operator.index(x)
    except TypeError:
        pass
    raise UsageError(f"`{name}` must be an integer; got {x!r}")


def flag(name: str, x: Any) -> bool:
    """Return a bool; 0 and 1 will do.

    Raises:
      UsageError: it is something else, such as the text "no".
    """
    if not isinstance(x, bool | np.bool_ | int | float) or x not in (0, 1):
        raise UsageError(f"`{name}` must be true or false; got {x!r}")
    return bool(x)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def _listed(x: Any) -> list[Any] | None:
    """Return the items of a list, tuple or array; None of anything else."""
    if isinstance(x, (list, tuple)):
        return list(x)
    return list(x) if hasattr(x, "shape") and x.shape else None


def choice(name: str, x: Any, allowed: Sequence[Any]) -> Any:
    """Return x if it is one of the allowed values.

    Raises:
      UsageError: it is not; they are listed.
    """
    if x not in allowed:
        raise UsageError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {x!r}")
    return x


def times(weight: Any, x: Array) -> Array:
    """Return weight * x in the dtype of x; a weight of exactly one costs nothing."""
    if isinstance(weight, float):
        return x if weight == 1.0 else x * x.dtype.type(weight)
    return x * weight.astype(x.dtype)


def scaled(x: Array, weight: Any) -> Array:
    """Return weight * x as `times` does; numpy writes over x."""
    if isinstance(weight, float) and weight != 1.0:
        x *= x.dtype.type(weight)
        return x
    return times(weight, x)


def only(x: Array, kept: Array) -> Array:
    """Return x where a bool array holds and zero elsewhere, faster than `where`; numpy writes over x."""
    if isinstance(x, np.ndarray):
        x *= kept  # what is cast stays in the cache
        return x
    return x * kept.astype(x.dtype)


def magnitude(x: Array) -> Array:
    """Return |x|; numpy writes over x."""
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return np.abs(x, out=x)
    return abs(x)


def reaches(x: Array, bound: Any) -> Array:
    """Say where |x| >= bound, of real numbers without an array of magnitudes."""
    if x.dtype.kind == "c":
        return abs(x) >= bound
    return (x >= bound) | (x <= -bound)


def add_up(terms: Sequence[Any], *, over: bool = False) -> Any:
    """Add terms one after the other: the order is part of the result; with `over` numpy writes over the
    first."""
    total = terms[0]
    for term in terms[1:]:
        if over and isinstance(term, np.ndarray):
            total += term
        else:
            total, over = total + term, True
    return total


def deltas(block: Block) -> Iterator[Array]:
    """Yield what each model changed: theta_i - theta_0, the task vectors."""
    return (x - block.base for x in block.models)
