"""What a rule must know of whole leaves: sums, and values of given rank, in memory.

numpy adds in float64, in grains of fixed size whose sums are added exactly, so that a file read in
pieces of any size gives the same bits; jax adds in the dtype of the terms. Ranks are exact in both.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax.errors import UsageError
from fishjax.merge._rule import Block, Options, Rule
from fishjax.types import Array

GRAIN = 1 << 16  # entries added by numpy at once


def measure(rule: Rule, blocks: Mapping[str, Block], options: Options) -> dict[str, Sequence[Any]]:
    """Return `{name: measured}` of the blocks that are whole leaves."""
    scope = options.get("scope", rule.scope)
    if rule.sums is not None:
        terms = {n: rule.sums(_widest(b), **options) for n, b in blocks.items()}
        sums: dict[str, Sequence[Any]] = {n: [total(t) for t in ts] for n, ts in terms.items()}
        if scope == "global":
            both = [add_exactly(column) for column in zip(*sums.values(), strict=True)]
            return dict.fromkeys(sums, both)
        return sums
    if rule.ranks is not None and rule.counts is not None:
        ranked = {n: rule.ranks(b, **options) for n, b in blocks.items()}
        if scope == "global":
            size = sum(b.models[0].size for b in blocks.values())
            columns = list(zip(*ranked.values(), strict=True))
            found = [thresholds(c, ks) for c, ks in zip(columns, rule.counts(size, **options), strict=True)]
            return dict.fromkeys(ranked, found)
        return {
            n: [thresholds([x], ks) for x, ks in zip(xs, rule.counts(xs[0].size, **options), strict=True)]
            for n, xs in ranked.items()
        }
    return dict.fromkeys(blocks, ())


def total(terms: Array) -> Any:
    """Return the sum of an array: a float for numpy, a scalar for jax."""
    if not isinstance(terms, (np.ndarray, np.generic)):
        return terms.sum()
    return math.fsum(grain_sums(np.ravel(terms)))


def grain_sums(terms: np.ndarray) -> list[float]:
    """Return the float64 sums of a flat array's grains, which begin at multiples of `GRAIN`."""
    return [float(terms[i : i + GRAIN].sum(dtype=np.float64)) for i in range(0, terms.size, GRAIN)]


def add_exactly(sums: Sequence[Any]) -> Any:
    """Add up sums of several leaves: exactly where they are floats."""
    if all(isinstance(s, float) for s in sums):
        return math.fsum(sums)
    result = sums[0]
    for s in sums[1:]:
        result = result + s
    return result


def thresholds(arrays: Sequence[Array], ks: Sequence[int]) -> list[Any]:
    """Return the k-th largest value over several arrays >= 0, for each k; infinity for k = 0."""
    if all(isinstance(x, (np.ndarray, np.generic)) for x in arrays):
        return largest(np.concatenate([np.ravel(x) for x in arrays]), ks)
    return [_bisect(arrays, k) for k in ks]


def largest(flat: np.ndarray, ks: Sequence[int]) -> list[float]:
    """Return the k-th largest entries of a flat array, for each k; infinity for k = 0 or none at all."""
    return [float(np.partition(flat, -k)[-k]) if k and flat.size else math.inf for k in ks]


def _bisect(arrays: Sequence[Array], k: int) -> Array:
    """Find the k-th largest by halving the range of bit patterns, which order floats >= 0: counting
    alone needs no sort, and of a sharded array no gather."""
    import jax
    import jax.numpy as jnp

    dtype = arrays[0].dtype
    bits = jnp.uint64 if dtype.itemsize == 8 else jnp.uint32
    if sum(x.size for x in arrays) >= 2**32:
        raise UsageError('`scope` global in memory counts to 2^32 entries; use scope="tensor" or merge files')
    one = jnp.asarray(1, bits)

    def halve(_, span):
        low, high = span  # the value's bits lie in [low, high)
        middle = low + (high - low) // jnp.asarray(2, bits)
        value = jax.lax.bitcast_convert_type(middle, dtype)
        count = sum((x >= value).sum(dtype=jnp.uint32) for x in arrays)
        enough = count >= jnp.asarray(k, jnp.uint32)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), bits)
    low, _ = jax.lax.fori_loop(0, dtype.itemsize * 8, halve, (infinity * 0, infinity + one))
    return jax.lax.bitcast_convert_type(low, dtype)


def _widest(block: Block) -> Block:
    """Return a numpy block in float64, so that terms and sums lose nothing; a jax block as it is."""
    if not isinstance(block.models[0], (np.ndarray, np.generic)):
        return block
    return widen(block, np.dtype(np.float64))


def widen(block: Block, dtype: Any) -> Block:
    """Return a block with its values in another dtype."""

    def cast(xs: Sequence[Array]) -> list[Array]:
        return [x.astype(np.result_type(dtype, x.dtype) if np.iscomplexobj(x) else dtype) for x in xs]

    base = None if block.base is None else cast([block.base])[0]
    return block._replace(
        models=cast(block.models), base=base, beside={k: cast(v) for k, v in block.beside.items()}
    )
