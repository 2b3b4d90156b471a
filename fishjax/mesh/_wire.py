"""Activations in eight bits while they cross from one stage to the next, and their gradients on the way back.

Entries share a scale in groups along the last axis, as in `leaves.quantised`; the rounding counts as the
identity in the backward pass (straight-through), whose cotangents are rounded in the same way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishjax.errors import UsageError
from fishjax.leaves._codec import decode, encode, near_divisor
from fishjax.types import Array

WIRES = ("float", "int8")
GROUP = 128  # entries that share a float32 scale: 0.258 of float32's bytes

Move = Callable[[Any], Any]  # takes a pytree of arrays from one device to another


def check_wire(wire: str) -> None:
    """Raise unless this is a way to send activations."""
    if wire not in WIRES:
        raise UsageError(f"`wire` must be one of {', '.join(WIRES)}; got `{wire}`")


def carried(x: Array, there: Move, back: Move, wire: str) -> Array:
    """Return `there(x)`; with `wire="int8"` what moves are codes and scales, in both directions.

    Args:
      x: `[..., D]`; integers and scalars move as they are.
      there: moves arrays; `back` moves their cotangents.

    >>> x = jnp.array([[0.5, -1.0, 0.25]])
    >>> carried(x, lambda x: x, lambda x: x, "int8").round(2).tolist()
    [[0.5, -1.0, 0.25]]
    """
    if wire == "float" or x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return there(x)
    dtype, group = x.dtype, near_divisor(x.shape[-1], GROUP)

    def sent(x: Array, move: Move) -> Array:
        codes, scales = move(encode(x, "int8", x.ndim - 1, group))
        groups = decode(codes, "int8", group, scales.dtype) * scales[..., None]
        return groups.reshape(*groups.shape[:-2], -1).astype(dtype)

    crossing = jax.custom_vjp(lambda x: sent(x, there))
    crossing.defvjp(lambda x: (sent(x, there), None), lambda _, g: (sent(g, back),))
    return crossing(x)
