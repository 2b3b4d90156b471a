"""Scores and masks that are sharded over a mesh: each process compares what it holds, once.

What a process sends to the others is its own k largest entries, never a score that cannot be kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fishjax.errors import UsageError
from fishjax.masks._largest import Found, Piece, keys_of, largest


def is_sharded(leaf: Any) -> bool:
    """Say whether a leaf is a jax array of several shards; needs no jax."""
    return hasattr(leaf, "addressable_shards") and not leaf.is_fully_replicated


def global_largest(leaves: Mapping[str, Any], names: Sequence[str], count: int) -> Found:
    """Return what `largest` does of whole leaves, from their shards.

    Args:
      leaves: all leaves, by which keys are counted; jax arrays, sharded or not, or numpy.
      names: those that compete.
    """
    keys_in, pieces = keys_of(leaves), []
    for name in names:
        leaf = leaves[name]
        if not is_sharded(leaf):
            pieces.append(Piece(name, np.asarray(leaf).reshape(-1), keys_in[name]))
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:  # one of those that hold the same entries
                pieces.append(_piece(name, leaf.shape, shard, keys_in[name]))
    here = min(count, sum(p.entries.size for p in pieces))
    alone = all(getattr(leaves[n], "is_fully_addressable", True) for n in names)
    problem: UsageError | None = None
    try:
        found = largest(pieces, here, in_order=False)
    except UsageError as error:
        if alone:
            raise
        found, problem = Found(np.zeros(0, np.int64), np.zeros(0)), error  # the others wait for an answer
    return found if alone else _of_all_processes(*found, count, problem)


def place(leaf: Any, where: np.ndarray) -> Any:
    """Return the mask `[*p]` of a leaf that keeps flat positions, sharded as the leaf is."""
    import jax
    import jax.numpy as jnp

    mask = np.zeros(leaf.shape, bool)
    mask.reshape(-1)[where] = True
    if is_sharded(leaf):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, mask.__getitem__)
    return jnp.asarray(mask)


def _piece(name: str, shape: tuple[int, ...], shard: Any, key: Any) -> Piece:
    block = np.asarray(shard.data)
    starts = [s.start or 0 for s in shard.index]

    def keys(at: np.ndarray) -> np.ndarray:
        inner = np.unravel_index(at, block.shape)
        return key(np.ravel_multi_index([i + s for i, s in zip(inner, starts, strict=True)], shape))

    return Piece(name, block.reshape(-1), keys)


def _of_all_processes(keys: np.ndarray, values: np.ndarray, count: int, problem: UsageError | None) -> Found:
    """Return the largest of what each process found; bits travel as uint32, which no setting narrows.

    Raises:
      UsageError: in every process, if one of them has a problem.
    """
    from jax.experimental.multihost_utils import process_allgather

    failed = np.flatnonzero(process_allgather(np.array([problem is not None])))
    if failed.size:
        raise problem or UsageError(
            f"`scores`: process {failed[0]} of several refused its part (its message says why)"
        )
    held = np.zeros(count, bool)
    held[: keys.size] = True
    padded = [
        np.concatenate([x, np.zeros(count - x.size, x.dtype)]) for x in (keys, values.astype(np.float64))
    ]
    words = np.stack([x.view(np.uint32).reshape(-1, 2) for x in padded])
    words, held = (np.asarray(process_allgather(x)) for x in (words, held))
    keys, values = (
        np.ascontiguousarray(words[:, i]).reshape(-1).view(t) for i, t in ((0, np.int64), (1, np.float64))
    )
    keys, first = np.unique(keys[held.reshape(-1)], return_index=True)  # replicated leaves came several times
    return largest([Piece("scores", values[held.reshape(-1)][first], keys.__getitem__)], count)
