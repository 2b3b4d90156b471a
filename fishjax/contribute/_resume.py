"""The folder of a training that was stopped: it says whose it is, and no other training goes on from it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fishjax import checkpoint, mesh
from fishjax.checkpoint._atomic import atomic_folder
from fishjax.errors import UsageError
from fishjax.types import Digest, Patch

_SETTINGS = "training.json"


def claim(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Return where a training keeps its state, after making sure that what is there is its own.

    Args:
      folder: is made if it is not there; the first of several processes makes it.
      settings: all that the result depends on, as JSON holds it.

    Raises:
      UsageError: the folder has the state of a training with other settings, which are named, or is no
        training's.
    """
    own = json.loads(json.dumps(settings))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        try:
            held = json.loads((folder / _SETTINGS).read_text())
        except (OSError, ValueError):
            raise UsageError(f"`{folder}` is no training's state; move it, or choose another `out`") from None
        if other := [n for n in own if held.get(n) != own[n]]:
            told = ", ".join(f"`{n}` was {held.get(n)!r} and is {own[n]!r}" for n in other)
            raise UsageError(
                f"`{folder}` has the state of another training, which would be gone on with: {told}. "
                "Remove it, or choose another `out`"
            )
    elif jax.process_index() == 0:
        with atomic_folder(folder) as made:
            (made / _SETTINGS).write_text(json.dumps(own))
    return folder / "state"


def start_id(patch: Patch) -> Digest:
    """Return what identifies a patch before it is trained: names, kinds and every bit."""
    arrays, structure = jax.tree.flatten(mesh.gather(patch))
    return checkpoint.digest({f"{structure}{i}": x for i, x in enumerate(arrays)})
