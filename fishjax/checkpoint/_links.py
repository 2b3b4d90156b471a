"""Symbolic links in a folder that somebody else made."""

import os
from pathlib import Path

from fishjax.errors import FileFormatError


def inside(path: Path, folder: Path) -> bool:
    """Say whether a file of a folder is where it seems to be: no link to it leads out of the folder.

    Links into the `blobs` beside a `snapshots` folder are how Hugging Face's cache stores a model, and
    are taken.
    """
    home = Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    real = Path(os.path.realpath(path))  # unlike `resolve`, also where links go in circles
    return any(real.is_relative_to(h) for h in homes)


def check_inside(path: Path, folder: Path) -> None:
    """Raise if a file of a folder is not `inside`; it need not exist.

    Raises:
      FileFormatError: naming the link.
    """
    if not inside(path, folder):
        raise FileFormatError(
            f"`{path}` is a symbolic link that leads out of its folder; where you trust it, copy the "
            "folder with its links followed"
        )


def check_links(folder: Path) -> None:
    """Raise if a file in a folder is a symbolic link that leads out of it.

    Raises:
      FileFormatError: naming the link.
    """
    for path in sorted(folder.iterdir()):
        check_inside(path, folder)
