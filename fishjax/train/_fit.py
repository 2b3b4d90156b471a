"""Steps over batches, with a progress bar, saved and resumed."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from fishjax.errors import UsageError
from fishjax.progress import track
from fishjax.train._state import restore_state, save_state
from fishjax.train._step import Step, TrainState
from fishjax.types import Array, Batch, Params


def fit(
    state: TrainState,
    step: Step,
    params: Params,
    batches: Iterable[Batch],
    *,
    steps: int,
    folder: str | os.PathLike | None = None,
    every: int = 500,
    description: str = "training",
) -> tuple[TrainState, Array]:
    """Take steps over batches; with a folder, save the state and go on from it when called again.

    Args:
      state: where to start; its arrays are given away (donated).
      step: as of `make_step`, not yet compiled.
      params: the base.
      batches: deterministic, so that a resumed training sees the same ones; at least `steps` of them.
      steps: how many steps in all, those of a resumed training included.
      folder: where the state is kept, every so many steps and at the end; None keeps it nowhere.
      every: steps between two saves.
      description: what the progress bar is called.

    Returns:
      The last state and the losses `[steps taken now]`.

    Raises:
      UsageError: the batches end too early; the state has taken more steps than it should.
    """
    if folder is not None and Path(folder).is_dir():
        state = restore_state(folder, state)
    start = int(state.step)
    if start > steps:
        raise UsageError(f"`folder` has the state of a training of {start} steps, more than {steps}")
    compiled = jax.jit(step, donate_argnums=0)
    losses = []
    todo = itertools.islice(batches, start, steps)
    for batch in track(todo, description=description, total=steps - start):
        state, loss = compiled(state, params, batch)
        losses.append(loss)
        if folder is not None and (start + len(losses)) % every == 0:
            save_state(folder, state)
    if int(state.step) < steps:
        raise UsageError(f"`batches` ended after {int(state.step)} of {steps} steps; make them endless")
    if folder is not None and len(losses) % every:
        save_state(folder, state)
    return state, jnp.array(losses)
