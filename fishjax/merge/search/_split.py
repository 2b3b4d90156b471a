"""Two parts of the examples at hand: one to choose by, one to report on."""

import hashlib
from typing import NamedTuple

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.types import Batch


class Split(NamedTuple):
    """Examples to choose by, and examples that have no part in the choice."""

    held_in: Batch
    held_out: Batch


def split(examples: Batch, *, held_out: float = 0.5, seed: int = 0) -> Split:
    """Split examples at random into a part to choose by and a part to report on.

    An example's place is a hash of the seed and of its content: the same on every machine and in any
    order of the examples, and equal examples are never on both sides.

    Args:
      examples: a pytree of arrays with one leading axis, [B, ...].
      held_out: the share to report on, in (0, 1); nearly that share, where examples are equal.
      seed: any integer.

    Returns:
      Both parts, each in the order of `examples`.

    Raises:
      UsageError: leading axes differ, the share is not in (0, 1), or a part would be empty.

    >>> parts = split({"x": np.arange(8)}, held_out=0.25)
    >>> [part["x"].size for part in parts], set(parts.held_in["x"]) & set(parts.held_out["x"])
    ([6, 2], set())
    """
    if not 0 < held_out < 1:
        raise UsageError(f"`held_out` must be a share in (0, 1); got {held_out}")
    flat = tree.flatten(examples)
    sizes = {np.shape(x)[:1] for x in flat.values()}
    if len(sizes) != 1 or () in sizes:
        raise UsageError(
            "`examples` must be arrays with one leading axis; got "
            + ", ".join(f"`{n}` {list(np.shape(x))}" for n, x in flat.items())
        )
    ((count,),) = sizes
    hashes = [hashlib.sha256(str(seed).encode()) for _ in range(count)]
    for name in sorted(flat):
        for digest, row in zip(hashes, np.asarray(flat[name]), strict=True):
            digest.update(np.ascontiguousarray(row).tobytes())
    places = [digest.digest() for digest in hashes]
    order = sorted(range(count), key=places.__getitem__)
    cut = count - round(held_out * count)
    while 0 < cut < count and places[order[cut]] == places[order[cut - 1]]:
        cut += 1
    if not 0 < cut < count:
        raise UsageError(
            f"of {count} examples (equal ones stay together) {held_out:g} cannot be held out; give more"
        )
    part = lambda rows: tree.rebuild(examples, {n: x[np.sort(rows)] for n, x in flat.items()})
    return Split(part(order[:cut]), part(order[cut:]))
