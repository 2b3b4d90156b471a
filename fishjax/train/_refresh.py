"""Change which entries a patch trains while it is trained: a mask that is refreshed on a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, tree_flatten_with_path

from fishjax import patches
from fishjax.errors import UsageError
from fishjax.patches import Sparse
from fishjax.train._step import TrainState, init, patch_of
from fishjax.types import Array, Mask, Params


def refresh(
    state: TrainState,
    params: Params,
    mask: Mask,
    optimizer: optax.GradientTransformation,
    *,
    keep: bool = True,
) -> tuple[TrainState, Params]:
    """Train the entries of another mask from here on.

    Entries that both masks keep go on as they were, bit for bit, with their state of the optimiser.
    The state of those that are let go is dropped, so nothing moves them again; new ones start from the
    weight as it is, with the state of a fresh `optimizer.init` (an optimiser's count of steps goes on).
    Entries of a patch that are not sparse are left alone.

    Args:
      state: concrete, with at least one sparse entry.
      params: the base of its patch.
      mask: bool `[*p]` for every leaf.
      optimizer: the one that made the state.
      keep: what was learnt in entries that are let go stays, frozen in the params that are returned;
        False: it is forgotten, the params stay what they were, and the patch is all that changed.

    Returns:
      The state, and the params that its patch is now for. With `keep`, what was learnt in all is
      `patches.diff(first params, patches.apply(params, patch))`.

    Raises:
      StructureError: the mask does not fit the params.
      UsageError: the patch has no sparse entries, or the mask keeps nothing.

    References: the mask that is chosen anew each epoch in Sung et al. 2021, arXiv 2111.09839, section 4.3.

    >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
    >>> patch = {"w": Sparse(jnp.array([0, 1]), jnp.array([9.0, 8.0]))}
    >>> optimizer = optax.adam(0.1)
    >>> mask = {"w": jnp.array([False, True, True])}
    >>> state, params = refresh(init(patch, optimizer), params, mask, optimizer)
    >>> params["w"], patch_of(state)["w"].values
    (Array([9., 8., 3.], dtype=float32), Array([8., 3.], dtype=float32))
    """
    old = patch_of(state)
    sparse = {name: kind for name, kind in old.items() if isinstance(kind, Sparse)}
    if not sparse:
        raise UsageError("there is no mask to refresh: the patch has no sparse entries")
    others = {name: kind for name, kind in old.items() if name not in sparse}
    if keep:
        params = patches.apply(params, sparse)
    new: dict[str, Any] = {}
    moves = {}
    for name, kind in patches.init_sparse(params, mask).items():
        if name in others:
            raise UsageError(f"`mask` keeps entries of `{name}`, which the patch changes in another way")
        if name in sparse:
            moves[name] = _common(sparse[name].indices, kind.indices)
            kind = Sparse(kind.indices, _carry(sparse[name].values, kind.values, moves[name]))
        new[name] = kind
    fresh = init({**others, **new}, optimizer)
    held = {_key(path): x for path, x in tree_flatten_with_path(state.opt_state)[0]}
    found, structure = tree_flatten_with_path(fresh.opt_state)
    leaves = [_resume(path, x, held.get(_key(path)), old, new, moves) for path, x in found]
    opt_state = jax.tree.unflatten(structure, leaves)
    return fresh._replace(opt_state=opt_state, step=state.step), params


def _resume(path: Any, fresh: Array, held: Any, old: Any, new: Any, moves: Any) -> Array:
    """Return a leaf of the optimiser's state: per entry if it has one number for each, else as it was."""
    if held is None:
        return fresh
    name = next((p.key for p in path if isinstance(p, DictKey) and p.key in new), None)
    per_entry = path and isinstance(path[-1], GetAttrKey) and path[-1].name == "values"
    if per_entry and name in moves and held.shape == old[name].values.shape:
        return _carry(held, fresh, moves[name]) if fresh.shape == new[name].values.shape else fresh
    return held if held.shape == fresh.shape else fresh


def _common(old: Array, new: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return where the positions that both have stand in each."""
    _, of_old, of_new = np.intersect1d(
        np.asarray(old), np.asarray(new), assume_unique=True, return_indices=True
    )
    return of_old, of_new


def _carry(old: Array, new: Array, move: tuple[np.ndarray, np.ndarray]) -> Array:
    of_old, of_new = move
    values = np.array(new)
    values[of_new] = np.asarray(old)[of_old]
    return jnp.asarray(values, new.dtype)


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path)
