"""Downstream: patches of tasks accepted before, applied again on the changed model, nothing retrained.

A change to a base should not break what others have built on it. To fine-tune every task again for every
contribution is too dear; but their patches are at hand, and to add them to the new base costs one
evaluation each.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishjax import tree
from fishjax.checkpoint._kinds import fold, touched
from fishjax.errors import UsageError
from fishjax.types import Array, Digest, Params, Patch
from fishjax.vet._context import Context, Finding, Task, as_changes, blocked
from fishjax.vet._packs import Pack
from fishjax.vet._tests import judge


def downstream(context: Context) -> Finding:
    """Compare base + task with base + patch + task, for each accepted task, on the tests it claims to raise.

    A task that claims no held test is tried on all of them. The rules are those of `tests`.

    References: Raffel, "Building Machine Learning Models Like Open Source Software", Communications of
    the ACM 66 (2) (2023) 38: re-use the updates of earlier fine-tuning runs.
    """
    if not context.downstream:
        return Finding("downstream", "skip", 0, "no accepted task was given", {})
    if reason := blocked(context):
        return Finding("downstream", "skip", 0, reason, {})
    if context.apply is None or not context.tests:
        return Finding("downstream", "skip", 7, "it takes a model folder and held tests", {})
    from fishjax.vet import _evaluate

    base, new = _evaluate.models(context)
    outcomes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    packs: list[Pack] = []
    for name, task in context.downstream.items():
        before, after = _evaluate.patched(base, task.patch), reapplied(base, new, task.patch)
        for pack in [p for p in context.tests if p.name in task.claims] or context.tests:
            one = pack._replace(name=f"{name}/{pack.name}")
            packs.append(one)
            outcomes[one.name] = tuple(_evaluate.right(context, p, pack) for p in (before, after))  # type: ignore[assignment]
    finding = judge(context._replace(tests=packs, metadata={}), outcomes)
    return finding._replace(name="downstream")


def reapplied(base: Params, new: Params, task: Patch) -> Params:
    """Return a changed base with a task's patch of the old base on top.

    What a task multiplies or adds (scale, low rank) is applied as it is. New values (dense, sparse) are put
    where the base did not change, and elsewhere move the changed base by as much as they moved the old one.

    >>> from fishjax.patches import Dense
    >>> base, new = {"w": np.array([1.0, 2.0])}, {"w": np.array([1.0, 5.0])}
    >>> [float(x) for x in reapplied(base, new, {"w": Dense(np.array([3.0, 2.5]))})["w"]]
    [3.0, 5.5]
    """
    import jax.numpy as jnp

    old, moved = tree.flatten(base), tree.flatten(new)
    leaves: dict[str, Array] = dict(moved)
    for name, change in as_changes(task).items():
        for target in touched(name, change):
            was, now = np.asarray(old[target]), np.asarray(moved[target])
            if change.kind in ("dense", "sparse"):
                tuned = fold(name, change, target, was)
                step = tuned.astype(np.float64) - was.astype(np.float64)
                both = (now.astype(np.float64) + step).astype(was.dtype)
                leaves[target] = jnp.asarray(np.where(now == was, tuned, both))
            else:
                leaves[target] = jnp.asarray(fold(name, change, target, now))
    return tree.rebuild(new, leaves)


def load_downstream(folder: str | os.PathLike, *, base_id: Digest) -> Mapping[str, Task]:
    """Read the accepted task patches of a folder, in the order of their names.

    Args:
      base_id: the content id of the base that they must be for.

    Raises:
      UsageError: no such folder, nothing in it, or a patch for another base.
      FileFormatError: a malformed patch.
    """
    from fishjax.checkpoint import read_patch

    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"the accepted tasks `{folder}` are no folder; give a folder of patch files")
    tasks: dict[str, Task] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        source = read_patch(path)
        if source.base_id != base_id:
            raise UsageError(
                f"the accepted task `{path.name}` is for base {source.base_id[:19]}…, this is {base_id[:19]}…"
            )
        claims: Any = source.metadata.get("claims", [])
        named = isinstance(claims, Sequence) and all(isinstance(c, str) for c in claims)
        tasks[path.name] = Task(source.changes, tuple(claims) if named else ())
    if not tasks:
        raise UsageError(f"the folder `{folder}` holds no patch")
    return tasks
