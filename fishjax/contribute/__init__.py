"""A contributor's work from a model folder to a patch file, and the ways to choose what is trained."""

from fishjax.contribute._choose import Made, fish, from_mask, from_patch, full, ia3, lora, magnitude, random
from fishjax.contribute._fit import adam, fit, make_step
from fishjax.contribute._read import read
from fishjax.contribute._run import run

__all__ = [
    "Made",
    "adam",
    "fish",
    "fit",
    "from_mask",
    "from_patch",
    "full",
    "ia3",
    "lora",
    "magnitude",
    "make_step",
    "random",
    "read",
    "run",
]
