"""A batch whose examples lie on several devices: each sums its own, one `psum` adds the sums up.

Left to `jit`, a scan over examples would scan a sharded axis and gather the batch on every device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fishjax.errors import UsageError
from fishjax.types import Batch


def sharding_of(batch: Batch) -> NamedSharding | None:
    """Return how the examples of a batch are laid over a mesh; None where one device has them all.

    Under `jit` the sharding of an argument is not to be seen, unless its mesh has explicit axes.

    Raises:
      UsageError: two leaves are laid out differently.
    """
    found = {}
    for leaf in jax.tree.leaves(batch):
        traced = isinstance(leaf, jax.core.Tracer)
        sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and data_axes(sharding):
            found[data_axes(sharding)] = sharding
    if len(found) > 1:
        got = ", ".join(map(str, found))
        raise UsageError(f"the leaves of a batch must be sharded alike on their leading axis; got {got}")
    return next(iter(found.values()), None)


def data_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """Return the mesh axes, of more than one device in all, over which a leading axis is divided."""
    first = sharding.spec[0] if len(sharding.spec) else None
    axes = first if isinstance(first, tuple) else (first,) if isinstance(first, str) else ()
    return axes if math.prod(sharding.mesh.shape[a] for a in axes) > 1 else ()


def on_each(fn: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
    """Return `fn(place, batch, *rest)` summed over the devices that each hold a part of the batch.

    Args:
      fn: is given how many parts there are before this one, the part, and the rest as it is. Other axes
        of the mesh than those of the examples stay as they were, so parameters may be sharded over them.

    Raises:
      UsageError: the batch does not divide.
    """
    axes = data_axes(sharding)
    parts = math.prod(sharding.mesh.shape[a] for a in axes)

    def summed(batch, *rest):
        return jax.lax.psum(fn(jax.lax.axis_index(axes), batch, *rest), axes)

    def run(batch, *rest):
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % parts:
            raise UsageError(f"{size} examples do not divide over {parts} devices of `{', '.join(axes)}`")
        whole = PartitionSpec()
        specs = (PartitionSpec(axes), *[whole] * len(rest))
        return jax.shard_map(
            summed, mesh=sharding.mesh, in_specs=specs, out_specs=whole, axis_names=set(axes), check_vma=False
        )(batch, *rest)

    return run
