"""Parameters from and to Orbax folders: whole or in part, onto shardings, and in the background."""

import atexit
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.checkpoint._dtypes import Spec, host
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.tree import flatten, map_named, nest
from fishjax.types import Params

_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
_UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax calls a folder until it is whole


def is_orbax(path: str | os.PathLike) -> bool:
    """Say whether a folder is an Orbax checkpoint."""
    return any(Path(path, mark).exists() for mark in _MARKS)


def orbax_specs(path: str | os.PathLike) -> dict[str, Spec]:
    """Return the dtypes and shapes of an Orbax folder's leaves, by name; no values are read.

    Raises:
      FileFormatError: it is damaged, unfinished, or holds symbolic links.
    """

    def read(checkpointer: Any, at: Path) -> dict[str, Spec]:
        leaves = flatten(_tree_of(checkpointer, at))
        return {n: Spec(np.dtype(x.dtype), tuple(x.shape)) for n, x in leaves.items()}

    return _reading(Path(path), read)


def load_orbax(
    path: str | os.PathLike,
    names: Collection[str] | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
) -> Params:
    """Read an Orbax folder, or just the leaves that are named, as numpy arrays in a nested dict.

    Args:
      names: leaves to read; None reads all and keeps the tree's own containers.
      dtype: cast what is read; None keeps each leaf's own.
      shardings: `{name: jax.sharding.Sharding}`, or one for all: such a leaf is read straight onto
        its devices, each of which reads its own part.

    Raises:
      FileFormatError: it is damaged, unfinished, or holds symbolic links.
      ValueError: a leaf's shape cannot be laid out as its sharding says.
    """
    import orbax.checkpoint as ocp

    def how(name: str, leaf: Any) -> Any:
        where = shardings.get(name) if isinstance(shardings, Mapping) else shardings
        if where is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        where.shard_shape(tuple(leaf.shape))  # raises where it does not fit
        return ocp.ArrayRestoreArgs(sharding=where, dtype=dtype)

    path = Path(path)
    tree = _reading(path, _tree_of)
    wanted = flatten(tree).keys() if names is None else set(names)
    item = map_named(lambda n, x: x if n in wanted else ocp.PLACEHOLDER, tree)
    args = map_named(lambda n, x: how(n, x) if n in wanted else ocp.RestoreArgs(), tree)
    restore = ocp.args.PyTreeRestore(item=item, restore_args=args)
    found = _reading(path, lambda checkpointer, at: checkpointer.restore(at, args=restore))
    return found if names is None else nest({n: x for n, x in flatten(found).items() if n in wanted})


def save_orbax(path: str | os.PathLike, params: Params, *, wait: bool = True) -> Callable[[], None] | None:
    """Write an Orbax folder, whole or not at all.

    Args:
      wait: False copies the parameters, writes in the background and returns a function that waits
        for the end and raises what went wrong. Until then there is no folder of that name.

    Raises:
      StructureError: a leaf's dtype cannot be written, or it has no entries.
      UsageError: `path` exists.
      OSError: the file system refuses, for instance because it is full.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f"`{path}` exists already; give a new name or remove it first")
    # The copy is of this moment: the caller may change or donate the arrays while they are written.
    flat = {n: host(n, x) if wait else host(n, x).copy() for n, x in flatten(params).items()}
    if empty := [n for n, x in flat.items() if not x.size]:
        raise StructureError(f"leaf `{empty[0]}` has no entries, which Orbax cannot hold; leave it out")
    tree = nest(flat)
    if wait:
        _write(path, tree)
        return None
    pool = ThreadPoolExecutor(1, "fishjax-save")
    future = pool.submit(_write, path, tree)
    pool.shutdown(wait=False)

    def finish() -> None:
        atexit.unregister(finish)
        future.result()

    atexit.register(finish)  # a program that ends without waiting is told what became of the save
    return finish


def _write(path: Path, tree: Params) -> None:
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)
    except BaseException as error:
        shutil.rmtree(path.with_name(path.name + _UNFINISHED), ignore_errors=True)
        if isinstance(error, ValueError):  # how tensorstore says that the system refused
            raise OSError(f"`{path}` could not be written: {error}") from error
        raise


def _tree_of(checkpointer: Any, path: Path) -> Any:
    return checkpointer.metadata(path).item_metadata.tree


def _reading(path: Path, read: Callable[[Any, Path], Any]) -> Any:
    """Return `read(checkpointer, path)` for a folder that has been looked over."""
    if _UNFINISHED in path.absolute().name:
        raise FileFormatError(f"`{path}` is what an interrupted save left; it is not whole, remove it")
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            if Path(folder, name).is_symlink():
                raise FileFormatError(
                    f"`{Path(folder, name)}` is a symbolic link; an Orbax folder must hold none"
                )
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return read(checkpointer, path.absolute())
    except Exception as error:  # whatever a damaged folder makes it raise
        raise FileFormatError(
            f"`{path}` is no readable Orbax checkpoint: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
