"""Precision algebra: patches that carry their Fisher merge by addition, and can be taken out again.

In information form a contribution is the precision L of every entry that it changes and L * d, d its
change of the base. Such pairs add: in any order, in any grouping, and a bad one is subtracted as if it
had never come. Floors, priors and normalisation are applied when the sum is resolved, never before.
Sums are float64 on the host and keep what rounding took from them, so that what is taken out of a sum
leaves what was there before however large it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import StructureError, UsageError
from fishjax.merge._rule import number
from fishjax.types import Array, Fisher, Params, Patch


class Evidence(NamedTuple):
    """What is known about some entries of a leaf, relative to the base."""

    indices: np.ndarray  # int64 [N], strictly increasing positions in C order
    precision: np.ndarray  # float64 [N], the sum of L
    shift: np.ndarray  # float64 [N], the sum of L * d
    rest: np.ndarray | None = None  # float64 [2, N], of a sum: what rounding took from precision and shift


Information = dict[str, Evidence]  # by leaf
Pair = tuple[np.ndarray, np.ndarray]


def information(params: Params, patch: Patch, precision: Fisher) -> Information:
    """Return a patch in information form.

    Args:
      params: the base.
      patch: sparse, dense and delta kinds: changes of entries, of which there is a diagonal precision.
      precision: the contributor's diagonal Fisher (times the number of its examples, if contributors
        are to count by their data), `[*p]` for every leaf of the patch, or `[N]` at the entries of a
        sparse one; finite and >= 0.

    Raises:
      StructureError: the patch does not fit the base, or the precision not the patch.
      UsageError: a low-rank or scale kind (its entries have no diagonal of their own); a precision that
        is negative or not finite.

    >>> import numpy as np
    >>> from fishjax.patches import Sparse
    >>> patch = {"w": Sparse(np.array([1]), np.float32([3.0]))}
    >>> information({"w": np.float32([1, 1])}, patch, {"w": np.float32([9.0, 4.0])})["w"].shift
    array([8.])
    """
    from fishjax.patches import Delta, Dense, Sparse, check

    check(params, patch)
    leaves, precisions = tree.flatten(params), tree.flatten(precision)
    found: Information = {}
    for name, kind in patch.items():
        if name not in precisions:
            raise StructureError(f"`precision` has no leaf `{name}`, which the patch changes")
        given = np.asarray(precisions[name]).astype(np.float64).reshape(-1)
        if isinstance(kind, Sparse):
            indices = np.asarray(kind.indices).astype(np.int64)
            values = np.asarray(kind.values).astype(np.float64)
        elif isinstance(kind, Dense):
            indices = np.arange(leaves[name].size, dtype=np.int64)
            values = np.asarray(kind.values).astype(np.float64).reshape(-1)
        elif isinstance(kind, Delta):
            every = np.arange(leaves[name].size) if kind.indices is None else np.asarray(kind.indices)
            indices = every.astype(np.int64)
            scales = np.repeat(np.asarray(kind.scales).astype(np.float64), kind.block)[: indices.size]
            values = None
        else:
            raise UsageError(
                f"`{name}` is patched by {type(kind).__name__}, whose factors have no diagonal precision; "
                "fold it into a dense or sparse patch first"
            )
        if given.size == leaves[name].size:
            given = given[indices]
        elif given.size != indices.size:
            raise StructureError(
                f"the precision of `{name}` has {given.size} entries; "
                f"wanted {leaves[name].size} or {indices.size}"
            )
        if not (np.isfinite(given) & (given >= 0)).all():
            raise UsageError(f"`precision` must be finite and >= 0; `{name}` is not everywhere")
        if values is None:
            step = np.asarray(kind.codes).astype(np.float64) * scales
        else:
            step = values - np.asarray(leaves[name]).astype(np.float64).reshape(-1)[indices]
        found[name] = Evidence(indices, given, given * step)
    return found


def add(*parts: Information) -> Information:
    """Return the sum of information: what all parts know together.

    >>> a = {"w": Evidence(np.array([0]), np.array([2.0]), np.array([1.0]))}
    >>> add(a, a)["w"].precision
    array([4.])
    """
    return _combine(parts, [1.0] * len(parts))


def subtract(whole: Information, part: Information) -> Information:
    """Return information without a part that was added before: a contribution is revoked.

    Entries that nobody else knows anything of vanish. A whole that carries its `rest`, as sums do, gives
    back what is 1e-25 of what is taken out; one without (stored as plain float64) what is 1e-9 of it.

    Raises:
      UsageError: the part is not in the whole: a precision would be negative, or a shift be left where
        no precision is.

    >>> a = {"w": Evidence(np.array([0]), np.array([2.0]), np.array([1.0]))}
    >>> b = {"w": Evidence(np.array([0, 5]), np.array([1.0, 1.0]), np.array([1.0, 0.5]))}
    >>> subtract(add(a, b), b)["w"].indices
    array([0])
    """
    return revoke_rounded(whole, part, None)


def revoke_rounded(whole: Information, part: Information, rounding: Information | None) -> Information:
    """Do what `subtract` does for sums that were rounded, as files hold them.

    Args:
      rounding: for each leaf, as its `shift`, by how much a shift may be wrong; None: sums are exact
        where they carry their `rest`.
    """
    rest = _combine([whole, part], [1.0, -1.0])
    result: Information = {}
    for name, left in rest.items():
        was = _spread(whole.get(name), left.indices)
        exact = rounding is None and name in whole and whole[name].rest is not None
        least = 1e-25 if exact else 1e-9
        slack = least * was.precision
        if (left.precision < -slack).any():
            raise UsageError(
                f"what is subtracted was never added: the precision of `{name}` would be negative"
            )
        known = left.precision > slack
        wrong = least * abs(was.shift)
        if rounding is not None:
            wrong += _spread(rounding.get(name), left.indices).shift
        if (abs(left.shift) > wrong)[~known].any():
            raise UsageError(
                f"what is subtracted was never added: of `{name}` a shift would be left without a precision"
            )
        if known.any():
            result[name] = Evidence(*(np.asarray(x)[..., known] for x in left))
    return result


def three_way(a: Information, b: Information, ancestor: Information) -> tuple[Information, int]:
    """Return what two descendants know, their common ancestor's information counted once.

    Where the difference would leave no positive precision (a descendant forgot what the ancestor
    knew), the more precise descendant's evidence stands alone; how many entries is returned too.

    Raises:
      UsageError: a precision is negative.
    """
    for which, part in (("a", a), ("b", b), ("ancestor", ancestor)):
        for name, evidence in part.items():
            if not (evidence.precision >= 0).all():
                raise UsageError(
                    f"`{which}` has a precision of `{name}` that is negative or NaN; wanted >= 0"
                )
    whole = _combine([a, b, ancestor], [1.0, 1.0, -1.0])
    guarded = 0
    result: Information = {}
    for name, sums in whole.items():
        either = [_spread(part.get(name), sums.indices) for part in (a, b)]
        old = _spread(ancestor.get(name), sums.indices)
        least = np.maximum(either[0].precision, either[1].precision)
        bad = (sums.precision <= 1e-9 * least) & ((least > 0) | (old.precision > 0))
        first = either[0].precision >= either[1].precision
        guarded += int(bad.sum())
        result[name] = Evidence(
            sums.indices,
            *(
                np.where(bad, np.where(first, x, y), s)
                for x, y, s in zip(*(e[1:] for e in (*either, sums)), strict=True)
            ),
        )
    return result, guarded


def resolve(
    params: Params,
    known: Information,
    *,
    prior: Fisher | float = 0.0,
    floor: float = 0.0,
    normalize: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """Return the patch that information amounts to: theta_0 + sum L d / (L_0 + sum L).

    Args:
      params: the base.
      known: from `information`, `add`, `subtract` or `three_way`.
      prior: L_0, the base's own precision: a tree like `params`, or one number for all. An entry that
        only one contributor touched moves all the way if it is zero.
      floor: the least denominator, >= 0.
      normalize: a factor for the evidence of each leaf, by name, applied here and nowhere else.

    Returns:
      A sparse patch; entries of zero precision stay the base's.

    Raises:
      StructureError: information about leaves or entries that the base does not have; a prior that lacks
        a leaf, or has it in another size.
      UsageError: a prior, floor or factor that is negative or not finite.

    >>> from fishjax.patches import Sparse
    >>> base = {"w": np.zeros(3, np.float32)}
    >>> known = {"w": Evidence(np.array([1]), np.array([3.0]), np.array([6.0]))}
    >>> resolve(base, known)["w"].values, resolve(base, known, prior=1.0)["w"].values
    (array([2.], dtype=float32), array([1.5], dtype=float32))
    """
    from fishjax.patches import Sparse

    leaves = tree.flatten(params)
    floor = number("floor", floor, 0)
    priors = None
    if np.ndim(prior) == 0 and not isinstance(prior, Mapping):
        prior = number("prior", prior, 0)
    else:
        priors = tree.flatten(prior)
    patch: dict[str, Any] = {}
    for name, evidence in known.items():
        ends = evidence.indices[:1], evidence.indices[-1:]
        if name not in leaves or (ends[0] < 0).any() or (ends[1] >= leaves[name].size).any():
            raise StructureError(
                f"there is information about entries of `{name}` that the base does not have"
            )
        flat = np.asarray(leaves[name]).reshape(-1)[evidence.indices]
        factor = 1.0 if normalize is None else number(f"normalize(`{name}`)", normalize(name), 0)
        origin = prior if priors is None else _prior_at(priors, name, leaves[name], evidence.indices)
        mass = np.maximum(origin + factor * evidence.precision, floor)
        step = np.divide(factor * evidence.shift, mass, out=np.zeros_like(mass), where=mass > 0)
        values = (flat.astype(np.float64) + step).astype(flat.dtype)
        small = np.int32 if leaves[name].size <= np.iinfo(np.int32).max else np.int64
        patch[name] = Sparse(evidence.indices.astype(small), values)
    return patch


def _prior_at(priors: Mapping[str, Array], name: str, leaf: Array, indices: np.ndarray) -> np.ndarray:
    if name not in priors or np.shape(priors[name]) != leaf.shape:
        got = list(np.shape(priors[name])) if name in priors else "missing"
        raise StructureError(f"`{name}` is {got} in `prior`; wanted {list(leaf.shape)} as in the base")
    found = np.asarray(priors[name]).astype(np.float64).reshape(-1)[indices]
    if not (np.isfinite(found) & (found >= 0)).all():
        raise UsageError(f"`prior` must be finite and >= 0; `{name}` is not everywhere")
    return found


def _combine(parts: Sequence[Mapping[str, Evidence]], signs: Sequence[float]) -> Information:
    result: Information = {}
    for name in sorted({n for part in parts for n in part}):
        indices = np.unique(np.concatenate([p[name].indices for p in parts if name in p]))
        high, low = np.zeros((2, indices.size)), np.zeros((2, indices.size))
        for part, sign in zip(parts, signs, strict=True):
            if name in part:
                more = _spread(part[name], indices)
                high, low = _plus(
                    high, low, sign * np.stack([more.precision, more.shift]), sign * np.asarray(more.rest)
                )
        result[name] = Evidence(indices, high[0], high[1], low)
    return result


def _plus(a: np.ndarray, a_low: np.ndarray, b: np.ndarray, b_low: np.ndarray) -> Pair:
    """Return the sum of two numbers that are pairs of float64, to about 2^-104 of it."""
    high, low = _two_sum(a, b)
    middle, lowest = _two_sum(a_low, b_low)
    high, low = _two_sum(high, low + middle)
    return _two_sum(high, low + lowest)


def _two_sum(a: np.ndarray, b: np.ndarray) -> Pair:
    """Return a + b rounded, and what rounding took from it, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _spread(evidence: Evidence | None, indices: np.ndarray) -> Evidence:
    """Return evidence over more entries, zero where nothing is known."""
    precision, shift, rest = np.zeros(indices.size), np.zeros(indices.size), np.zeros((2, indices.size))
    if evidence is not None:
        places = np.searchsorted(indices, evidence.indices)
        precision[places], shift[places] = evidence.precision, evidence.shift
        if evidence.rest is not None:
            rest[:, places] = evidence.rest
    return Evidence(indices, precision, shift, rest)
