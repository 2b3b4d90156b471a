"""Patch files as inputs of a merge: what they change is folded, everything else is the base's."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from fishjax.checkpoint import _kinds, open_params, read_patch
from fishjax.checkpoint._digest import leaf_digest
from fishjax.checkpoint._dtypes import Spec
from fishjax.checkpoint._manifest import is_sealed
from fishjax.checkpoint._safetensors import open_file, write_file
from fishjax.errors import WrongBaseError


def is_patch(path: str | os.PathLike) -> bool:
    """Say whether a path is a patch file."""
    if os.path.isdir(path) or os.fspath(path).endswith((".yaml", ".yml")):
        return False
    with open_file(path) as file:
        return is_sealed(file.metadata) and json.loads(file.metadata["fishjax"]).get("format") == "patch"


def fold_patch(path: str | os.PathLike, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the leaves that a patch changes, as they are then.

    Raises:
      WrongBaseError: the patch is for another base.
    """
    file = read_patch(path)
    for name, want in file.base_digests.items():
        if name not in base or leaf_digest(name, base[name]) != want:
            raise WrongBaseError(f"`{path}` is for another base: `{name}` is missing or has other values")
    return {
        target: _kinds.fold(name, change, target, base[target])
        for name, change in file.changes.items()
        for target in _kinds.touched(name, change)
    }


def folded_file(stack: ExitStack, path: str | os.PathLike, base: str | os.PathLike) -> str:
    """Write the leaves that a patch changes to a temporary file, gone with the stack."""
    with open_params(base) as tensors:
        folded = fold_patch(path, tensors)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fishjax-"))
    target = os.path.join(folder, "folded.safetensors")
    write_file(target, {n: Spec(x.dtype, x.shape) for n, x in folded.items()}, folded.__getitem__)
    return target
