"""What is in a file or folder, and whether it is sound. Needs no jax."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fishjax.checkpoint._config import family
from fishjax.checkpoint._digest import leaf_digest, root
from fishjax.checkpoint._dtypes import NAMES, Spec, num_bytes
from fishjax.checkpoint._fisher import load_fisher
from fishjax.checkpoint._manifest import is_sealed, read_sealed
from fishjax.checkpoint._mask import load_mask
from fishjax.checkpoint._params import INDEX, open_params
from fishjax.checkpoint._patch import read_patch
from fishjax.checkpoint._safetensors import open_file
from fishjax.errors import FishjaxError
from fishjax.progress import track


class Finding(NamedTuple):
    """One file that `fsck` looked at."""

    path: str
    kind: str  # "model", "index", "patch", "fisher", "mask", or "other": not checked
    problem: str | None  # None: it is sound


def inspect(path: str | os.PathLike, *, content_id: bool = True) -> dict[str, Any]:
    """Return a report on a model, patch, Fisher or mask, made of what JSON can hold.

    Args:
      content_id: compute a model's content id, for which all of it is read.

    Raises:
      FileFormatError: it is malformed or corrupt.
      FileNotFoundError: there is nothing there.

    >>> import tempfile, numpy as np
    >>> from fishjax.checkpoint import save_params
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_params(folder + "/m.safetensors", {"w": np.ones(2)})
    ...     inspect(folder + "/m.safetensors")["tensors"]
    [{'name': 'w', 'dtype': 'F64', 'shape': [2], 'bytes': 16}]
    """
    if Path(path).is_file() and (kind := _sealed_kind(path)):
        return _inspect_sealed(path, kind)
    with open_params(path) as tensors:
        named = family(Path(path)) if Path(path).is_dir() else None
        report: dict[str, Any] = {"kind": "model", **({"family": named} if named else {})}
        report |= _table(tensors.specs)
        if content_id:
            names = track(sorted(tensors), description="hashing")
            report["id"] = root({name: leaf_digest(name, tensors[name]) for name in names})
        said = {k: v for file in tensors.files.values() for k, v in file.metadata.items()}
        return report | ({"metadata": said} if said else {})


def fsck(path: str | os.PathLike) -> list[Finding]:
    """Verify one file, or every safetensors file and index in a folder, to its bottom.

    A file that fishjax wrote is checked byte by byte against its own digest; of others the header is.

    Raises:
      FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.is_dir():
        os.lstat(path)
        return [_check(path)]
    found = sorted(Path(top, name) for top, _, files in os.walk(path) for name in files)
    return [_check(file) if _is_ours(file) else Finding(str(file), "other", None) for file in found]


def _is_ours(path: Path) -> bool:
    """Say whether a file in a folder should be checked: by its name, else by its first bytes."""
    if path.name.endswith((".safetensors", ".index.json")):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(40)[8:].startswith(b'{"__metadata__":{"fishjax":')


def _check(path: Path) -> Finding:
    kind = "model"
    try:
        if path.name.endswith(".index.json"):
            kind = "index"
            if path.name == INDEX:
                open_params(path.parent).close()
        else:
            kind = _sealed_kind(path) or "model"
            if kind in _LOADERS:
                _LOADERS[kind](path)
    except (FishjaxError, OSError) as error:
        return Finding(str(path), kind, str(error))
    return Finding(str(path), kind, None)


_LOADERS: dict[str, Callable[[Any], Any]] = {"patch": read_patch, "fisher": load_fisher, "mask": load_mask}


def _sealed_kind(path: str | os.PathLike) -> str | None:
    """Return the format that a file of ours declares, after verifying it; None for other files."""
    with open_file(path) as file:
        if not is_sealed(file.metadata):
            return None
    return str(read_sealed(path).manifest.get("format"))


def _inspect_sealed(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    manifest, tensors, digest = read_sealed(path)
    report = {
        "kind": kind,
        **_table({n: Spec(x.dtype, x.shape) for n, x in tensors.items()}),
        "digest": digest,
    }
    if kind != "patch":
        if kind in _LOADERS:
            _LOADERS[kind](path)
        return report | {"metadata": manifest.get("metadata", {})}
    file = read_patch(path, check_finite=False)
    return report | {
        "base": file.base_id,
        "changes": {name: change.kind for name, change in file.changes.items()},
        "base_digests": file.base_digests,
        "result_digests": file.result_digests,
        "metadata": file.metadata,
        **({"precision": sorted(file.precision)} if file.precision else {}),
        **({"lossy": file.lossy} if file.lossy else {}),
    }


def _table(specs: dict[str, Spec]) -> dict[str, Any]:
    rows = [
        {"name": n, "dtype": NAMES[s.dtype], "shape": list(s.shape), "bytes": num_bytes(*s)}
        for n, s in sorted(specs.items())
    ]
    return {"tensors": rows, "bytes": sum(r["bytes"] for r in rows)}
