"""Models as pure functions over a parameter tree that is the checkpoint file.

`load` reads a folder in Hugging Face's layout. Names and layouts stay those of the file, so a patch
made here applies to the folder that others use. One file a family, listed in `FAMILIES`.
"""

from fishjax.models._example import example_logits, example_loss
from fishjax.models._folder import load, save
from fishjax.models._model import FAMILIES, Model, build
from fishjax.models._remat import remat
from fishjax.models._scan import scanned, stack_blocks, stack_patch, unstack_patch
from fishjax.models._tokenizer import encode, load_tokenizer, pad, until_end

__all__ = [
    "FAMILIES",
    "Model",
    "build",
    "encode",
    "example_logits",
    "example_loss",
    "load",
    "load_tokenizer",
    "pad",
    "remat",
    "save",
    "scanned",
    "stack_blocks",
    "stack_patch",
    "unstack_patch",
    "until_end",
]
