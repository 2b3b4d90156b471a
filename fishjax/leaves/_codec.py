"""Codes of eight or four bits for the entries of a weight, and back."""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.types import Array


class Format(NamedTuple):
    """How entries are kept."""

    bits: int  # of one code; two codes of 4 bits share a byte
    bound: float  # the largest entry of a group is this many scales
    group: int  # entries that share a scale, where that divides the axis


# A bound half a step above the largest code uses the outermost bins in full.
FORMATS = {"int8": Format(8, 127.5, 128), "int4": Format(4, 7.5, 64), "nf4": Format(4, 1.0, 64)}

# The quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@partial(jax.jit, static_argnums=(1, 2, 3))
def encode(w: Array, format: str, axis: int, group: int) -> tuple[Array, Array]:
    """Return codes `[*rest, M, group]`, those of 4 bits two a byte, and scales `[*rest, M]`."""
    how = FORMATS[format]
    w = jnp.moveaxis(jnp.asarray(w), axis, -1).astype(tree.wide_dtype(w.dtype))
    w = w.reshape(*w.shape[:-1], -1, group)
    scales = jnp.max(jnp.abs(w), axis=-1) / how.bound
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    w = w / scales[..., None]
    if format == "nf4":
        middles = [(a + b) / 2 for a, b in pairwise(NF4)]
        codes = sum((w > m).astype(jnp.uint8) for m in middles)
    else:
        half = 1 << (how.bits - 1)
        codes = jnp.clip(jnp.round(w), -half, half - 1).astype(jnp.int8)
    if how.bits == 8:
        return codes, scales
    codes = codes if format == "nf4" else (codes + 8).astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, group % 2)])
    low, high = jnp.split(codes, 2, axis=-1)  # the halves of a group: no interleaving when it is formed
    return low | (high << 4), scales


def decode(codes: Array, format: str, group: int, dtype: Any) -> Array:
    """Return what the codes stand for, in scales, `[..., group]`."""
    if format == "int8":
        return codes.astype(dtype)
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[..., :group]
    if format == "int4":
        return codes.astype(dtype) - 8
    values = [jnp.asarray(v, dtype) for v in NF4]
    for bit in range(4):  # a tree of selects: faster than looking each entry up
        on = (codes >> bit) & 1 == 1
        values = [jnp.where(on, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


def near_divisor(n: int, wanted: int) -> int:
    """Return the divisor of n that comes nearest to a number, by their ratio; the smaller one of two.

    >>> near_divisor(768, 64), near_divisor(160, 64), near_divisor(67, 64)
    (64, 80, 67)
    """
    found = [d for i in range(1, int(n**0.5) + 1) if n % i == 0 for d in (i, n // i)]
    return min(sorted(found), key=lambda d: max(d, wanted) / min(d, wanted))
