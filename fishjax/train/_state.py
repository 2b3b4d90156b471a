"""A training's state on disk, through Orbax."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.types import Array


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Save a training state (any pytree of arrays) through Orbax, replacing what `path` held.

    Args:
      path: a folder; it appears whole or not at all.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).resolve(), _named(state), force=True)


def restore_state(path: str | os.PathLike, like: Any) -> Any:
    """Restore what `save_state` saved; training goes on bit for bit as if it had not stopped.

    Args:
      path: the folder.
      like: a state of the same structure, shapes and dtypes (a fresh `init`).

    Raises:
      UsageError: no such folder.
      StructureError: it holds another training's state.
      FileFormatError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    if not path.is_dir():
        raise UsageError(f"`{path}` is not a folder; there is no training state to restore")
    wanted = _named(like)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(path)
            found = dict(getattr(metadata, "item_metadata", metadata).tree)
        except Exception as error:
            raise FileFormatError(f"`{path}` holds no readable training state: {error}") from None
        tree.check_same(wanted, found, ("the state", f"`{path}`"))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        restored = checkpointer.restore(path, abstract)
    leaves = [restored[f"{i}"] for i in range(len(restored))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def remove_state(path: str | os.PathLike) -> None:
    """Remove a training state that is no longer needed; nothing happens if there is none."""
    shutil.rmtree(path, ignore_errors=True)


def _named(state: Any) -> dict[str, Array]:
    """Return the leaves by their place: names of a patch's leaves hold dots, which Orbax may split."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(state)]
    if not leaves:
        raise StructureError("there is nothing to save: the state has no arrays")
    return {f"{i}": x for i, x in enumerate(leaves)}
