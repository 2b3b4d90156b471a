"""Symbolic links in a folder that somebody else made."""

from pathlib import Path

from fishjax.errors import FileFormatError


def check_links(folder: Path) -> None:
    """Raise if a file in a folder is a symbolic link that leads out of it.

    Links into the `blobs` beside a `snapshots` folder are how Hugging Face's cache stores a model, and
    are taken.

    Raises:
      FileFormatError: naming the link.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(h) for h in homes):
            raise FileFormatError(
                f"`{path}` is a symbolic link that leads out of its folder; where you trust it, copy the "
                "folder with its links followed"
            )
