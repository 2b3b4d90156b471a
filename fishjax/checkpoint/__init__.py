"""Checkpoints: parameters, patches, masks and Fishers from and to files, and what identifies them.

Everything here is strict (one header parser in front of every read, no unpickler anywhere), atomic
(whole files or nothing) and free of jax, but for Orbax folders and the kinds that `load_patch` makes.
"""

from fishjax.checkpoint._digest import digest
from fishjax.checkpoint._params import ParamFiles, load_params, open_params, save_params
from fishjax.checkpoint._patch import PatchFile, load_patch, read_patch, save_patch

__all__ = [
    "ParamFiles",
    "PatchFile",
    "digest",
    "load_params",
    "load_patch",
    "open_params",
    "read_patch",
    "save_params",
    "save_patch",
]
