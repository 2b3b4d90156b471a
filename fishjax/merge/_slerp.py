"""SLERP: along the arc between two models rather than the chord, leaf by leaf."""

import math
from collections.abc import Sequence
from typing import Any

from fishjax.errors import UsageError
from fishjax.merge._rule import Block, Options, Rule, choice, number, times
from fishjax.merge._trees import Keep, merge_trees
from fishjax.types import Array, Params

PARALLEL = 1e-6  # below this sine of the angle the arc is the chord


def slerp(
    models: Sequence[Params], *, t: float, keep: Keep | None = None, compat: str | None = None
) -> Params:
    """Return the point at t on the arc between two models, each leaf a vector.

    sin((1 - t) w) / sin w * a + sin(t w) / sin w * b, w the angle between a and b; the chord where
    they are parallel or one is zero.

    Args:
      models: two trees with the same names, shapes and dtypes; integer leaves must be equal.
      t: 0 is the first model, 1 the second.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.
      compat: "mergekit" takes the chord from a cosine of 0.9995 on.

    Raises:
      StructureError: models differ in names or shapes.
      UsageError: not two models, or t outside [0, 1].

    >>> import numpy as np
    >>> a, b = {"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}
    >>> slerp([a, b], t=0.5)["w"]
    array([0.70710677, 0.70710677], dtype=float32)

    References: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, section 3.3.
    """
    return merge_trees(SLERP, models, keep=keep, t=t, compat=compat)


def nuslerp(models: Sequence[Params], *, base: Params, t: float, keep: Keep | None = None) -> Params:
    """Return the base plus the point at t on the arc between two models' changes, leaf by leaf.

    Args:
      models: two trees with the same names, shapes and dtypes; integer leaves must be equal.
      base: the tree that both started from.
      t: 0 is the first model, 1 the second.
      keep: ordered `(regex of a leaf's name, i)`: leaves taken whole from model i, see `average`.

    Raises:
      StructureError: models or base differ in names or shapes.
      UsageError: not two models, or t outside [0, 1].

    >>> import numpy as np
    >>> a, b, base = ({"w": np.float32(x)} for x in ([2, 1], [1, 2], [1, 1]))
    >>> nuslerp([a, b], base=base, t=0.5)["w"]
    array([1.7071068, 1.7071068], dtype=float32)
    """
    return merge_trees(NUSLERP, models, base=base, keep=keep, t=t)


def _check(n: int, *, t: float, compat: str | None = None) -> Options:
    if n != 2:
        raise UsageError(f"`models` must be two, the ends of an arc; got {n}")
    chord = 0.9995 if choice("compat", compat, ("mergekit", None)) else None
    return {"t": number("t", t, 0, 1), "chord": chord}


def _ends(block: Block) -> tuple[Array, Array]:
    a, b = block.models
    return (a, b) if block.base is None else (a - block.base, b - block.base)


def _products(block: Block, **_: Any) -> list[Array]:
    a, b = _ends(block)
    return [a * a, b * b, a * b]


def _leaf(block: Block, *, t: Any, chord: float | None) -> Array:
    a, b = _ends(block)
    first, second = _coefficients(*block.measured, t=t, chord=chord)
    merged = times(first, a) + times(second, b)
    return merged if block.base is None else block.base + merged


def _coefficients(aa: Any, bb: Any, ab: Any, *, t: Any, chord: float | None) -> tuple[Any, Any]:
    if all(isinstance(x, float) for x in (aa, bb, ab, t)):
        cosine = min(1.0, max(-1.0, ab / math.sqrt(aa * bb))) if aa * bb > 0 else 1.0
        angle = math.acos(cosine)
        sine = math.sin(angle)
        if sine < PARALLEL or (chord is not None and abs(cosine) > chord):
            return 1 - t, t
        return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
    import jax.numpy as jnp

    aa, bb, ab = (jnp.asarray(x) for x in (aa, bb, ab))
    t = jnp.asarray(t, ab.dtype)
    some = (aa > 0) & (bb > 0)
    cos = jnp.where(some, ab / jnp.where(some, jnp.sqrt(aa) * jnp.sqrt(bb), 1), 1)
    arc = jnp.arccos(jnp.clip(cos, -1, 1))
    height = jnp.sin(arc)
    flat = (height < PARALLEL) | ((jnp.abs(cos) > chord) if chord is not None else False)
    safe = jnp.where(flat, 1, height)
    first = jnp.where(flat, 1 - t, jnp.sin((1 - t) * arc) / safe)
    return first, jnp.where(flat, t, jnp.sin(t * arc) / safe)


SLERP = Rule(_leaf, _check, sums=_products)
NUSLERP = Rule(_leaf, _check, needs_base=True, sums=_products)
