"""Training a patch: a pure step, steps over batches, their state on disk; the recipe of T-Few.

The optimiser sees the patch's inexact leaves and nothing else, so its state is as small as the patch.
"""

from fishjax.train._adafactor import adafactor
from fishjax.train._choices import TokenScores, score_choices
from fishjax.train._fit import fit
from fishjax.train._in_place import InPlaceStep, make_in_place_step
from fishjax.train._local import LocalSteps, Traffic, WorkersState, bytes_sent, local_steps
from fishjax.train._losses import (
    choice_lm_loss,
    legacy_lm_loss,
    legacy_tfew_loss,
    legacy_unlikelihood_loss,
    length_normalised_loss,
    lm_loss,
    tfew_loss,
    unlikelihood_loss,
)
from fishjax.train._mixed import make_mixed_step
from fishjax.train._rank import Spread, rank_classify, spread
from fishjax.train._refresh import refresh
from fishjax.train._stages import fit_refreshed
from fishjax.train._state import remove_state, restore_state, save_state
from fishjax.train._step import Step, TrainState, init, make_step, patch_of
from fishjax.train._sync import make_parallel_step

__all__ = [
    "InPlaceStep",
    "LocalSteps",
    "Spread",
    "Step",
    "TokenScores",
    "Traffic",
    "TrainState",
    "WorkersState",
    "adafactor",
    "bytes_sent",
    "choice_lm_loss",
    "fit",
    "fit_refreshed",
    "init",
    "legacy_lm_loss",
    "legacy_tfew_loss",
    "legacy_unlikelihood_loss",
    "length_normalised_loss",
    "lm_loss",
    "local_steps",
    "make_in_place_step",
    "make_mixed_step",
    "make_parallel_step",
    "make_step",
    "patch_of",
    "rank_classify",
    "refresh",
    "remove_state",
    "restore_state",
    "save_state",
    "score_choices",
    "spread",
    "tfew_loss",
    "unlikelihood_loss",
]
