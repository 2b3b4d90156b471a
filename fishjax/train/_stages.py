"""A training in stages, between which its mask is chosen anew; resumed like any other."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from fishjax import checkpoint, patches
from fishjax.errors import UsageError
from fishjax.train._fit import fit
from fishjax.train._refresh import refresh
from fishjax.train._state import remove_state, save_state
from fishjax.train._step import Step, TrainState, init, patch_of
from fishjax.types import Array, Batch, Mask, Params

_LAST = "mask.safetensors"  # written last: a stage with it can be resumed


def fit_refreshed(
    state: TrainState,
    step: Step,
    params: Params,
    batches: Callable[[], Iterable[Batch]],
    choose: Callable[[Params], Mask],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    refresh_every: int,
    folder: str | os.PathLike | None = None,
    every: int = 500,
    description: str = "training",
    place: Callable[[TrainState], TrainState] = lambda state: state,
) -> tuple[TrainState, Params, Array]:
    """Take steps as `fit` does, with a new mask every so many; what was learnt so far stays (`refresh`).

    Args:
      state, step, params, steps, every, description: as of `fit`; the patch is sparse.
      batches: makes the same batches each time that it is called.
      choose: of the parameters as they are by then, deterministic, so that a resumed training agrees.
      optimizer: the one that made the state.
      refresh_every: steps between two refreshes, at least 1.
      folder: where stages are kept; None keeps them nowhere.
      place: lays a state out on a mesh.

    Returns:
      The last state, the params that its patch is for, and the losses `[steps taken now]`. All that
      was learnt is `patches.diff(params given, patches.apply(params returned, patch))`.

    Raises:
      UsageError: `refresh_every` is less than 1; the batches end too early.
    """
    if refresh_every < 1:
        raise UsageError(f"`refresh_every` must be at least 1; got {refresh_every}")
    base, losses = params, []
    stages = -(-steps // refresh_every)
    root = None if folder is None else Path(folder)
    first = (
        0 if root is None else max((i for i in range(stages) if (_at(root, i) / _LAST).exists()), default=0)
    )
    for stage in range(first, stages):
        if stage > first:
            mask = choose(patches.apply(params, patch_of(state)))
            state, params = refresh(state, params, mask, optimizer)
            state = place(state)
            if root is not None:
                _begin(root, stage, state, base, params, mask)
        elif stage and root is not None:
            learnt, _ = checkpoint.load_patch(_at(root, stage) / "learnt.safetensors")
            mask, _ = checkpoint.load_mask(_at(root, stage) / _LAST)
            params = patches.apply(base, jax.tree.map(jnp.asarray, learnt))
            like = patches.init_sparse(params, mask)
            state = place(init(like, optimizer))
        state, some = fit(
            state,
            step,
            params,
            batches(),
            steps=min(steps, (stage + 1) * refresh_every),
            folder=None if root is None else _at(root, stage) / "state",
            every=every,
            description=description,
        )
        losses.append(some)
    return state, params, jnp.concatenate(losses)


def _begin(root: Path, stage: int, state: TrainState, base: Params, params: Params, mask: Mask) -> None:
    """Write what a stage starts from, and remove the one before."""
    here = _at(root, stage)
    here.mkdir(parents=True, exist_ok=True)
    save_state(here / "state", state)
    checkpoint.save_patch(here / "learnt.safetensors", patches.diff(base, params), base=base)
    checkpoint.save_mask(here / _LAST, mask)
    remove_state(_at(root, stage - 1))


def _at(root: Path, stage: int) -> Path:
    return root / f"stage-{stage}"
