"""Training a patch: a pure step, steps over batches, and their state on disk.

The optimiser sees the patch's inexact leaves and nothing else, so its state is as small as the patch.
"""

from fishjax.train._fit import fit
from fishjax.train._local import LocalSteps, Traffic, WorkersState, bytes_sent, local_steps
from fishjax.train._state import remove_state, restore_state, save_state
from fishjax.train._step import Step, TrainState, init, make_step, patch_of
from fishjax.train._sync import make_parallel_step

__all__ = [
    "LocalSteps",
    "Step",
    "Traffic",
    "TrainState",
    "WorkersState",
    "bytes_sent",
    "fit",
    "init",
    "local_steps",
    "make_parallel_step",
    "make_step",
    "patch_of",
    "remove_state",
    "restore_state",
    "save_state",
]
