"""Checkpoints: parameters, patches, masks and Fishers from and to files, and what identifies them.

Everything here is strict (one header parser in front of every read, no unpickler anywhere), atomic
(whole files or nothing) and free of jax, but for Orbax folders and the kinds that `load_patch` makes.
"""

from fishjax.checkpoint._apply import apply_file
from fishjax.checkpoint._diff import diff_files
from fishjax.checkpoint._digest import digest
from fishjax.checkpoint._fisher import load_fisher, save_fisher
from fishjax.checkpoint._inspect import fsck, inspect
from fishjax.checkpoint._mask import load_mask, save_mask, write_mask
from fishjax.checkpoint._params import ParamFiles, load_params, open_params, save_params
from fishjax.checkpoint._patch import PatchFile, load_patch, load_precision, read_patch, save_patch
from fishjax.checkpoint._peft import load_peft
from fishjax.checkpoint._peft_save import save_peft

__all__ = [
    "ParamFiles",
    "PatchFile",
    "apply_file",
    "diff_files",
    "digest",
    "fsck",
    "inspect",
    "load_fisher",
    "load_mask",
    "load_params",
    "load_patch",
    "load_peft",
    "load_precision",
    "open_params",
    "read_patch",
    "save_fisher",
    "save_mask",
    "save_params",
    "save_patch",
    "save_peft",
    "write_mask",
]
