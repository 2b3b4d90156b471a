"""Patch a model on disk, tensor by tensor: exactly what the patch's author had, or nothing."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fishjax.checkpoint import _kinds
from fishjax.checkpoint._atomic import atomic_folder, refuse_existing, sync
from fishjax.checkpoint._digest import leaf_digest, root
from fishjax.checkpoint._dtypes import Spec
from fishjax.checkpoint._links import inside
from fishjax.checkpoint._params import INDEX, REFUSED, SINGLE, ParamFiles, open_params
from fishjax.checkpoint._patch import PatchFile, read_patch
from fishjax.checkpoint._safetensors import release, write_file
from fishjax.errors import FileFormatError, UsageError, WrongBaseError
from fishjax.progress import track
from fishjax.types import Digest


class Applied(NamedTuple):
    """What `apply_file` did."""

    digest: Digest  # the content id of the new model
    changed: int  # tensors that differ from the base
    leaves: int  # all tensors
    left_out: list[str]  # files of the base folder that were not carried along


def apply_file(
    patch: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    *,
    touched_only: bool = False,
) -> Applied:
    """Write the patched model; memory stays within a few times the largest tensor. Needs no jax.

    The base's digests are checked before anything is written and each result's digest before it
    is. Other files of a base folder (configuration, tokenizer) are carried along, where no link leads
    out of it.

    Args:
      patch: a patch file.
      base: a .safetensors file or a Hugging Face folder.
      out: a new .safetensors file, or a new (or empty) folder.
      touched_only: accept a base that differs in tensors which the patch does not change.

    Raises:
      WrongBaseError: the base is not the one that the patch is for; names the tensor.
      FileFormatError: a file is malformed or corrupt, or a result is not what the patch promises.
      UsageError: `out` exists, or lies in the base's folder.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out)
    if base.resolve() in out.resolve().parents:
        raise UsageError(f"`{out}` lies in the base `{base}`; give another name")
    file = read_patch(patch, lazy=True)
    with open_params(base) as tensors:
        digests = _check_base(patch, file, base, tensors, touched_only)
        owners = {t: n for n, change in file.changes.items() for t in _kinds.touched(n, change)}

        def read(name: str) -> np.ndarray:
            if name not in owners:
                return tensors[name]
            change = file.changes[owners[name]]
            new = _kinds.fold(owners[name], change, name, tensors[name])
            for field in set(change.arrays) - {"indices"}:
                release(change.arrays[field])
            digests[name] = leaf_digest(name, new)
            if file.result_digests.get(name, digests[name]) != digests[name]:
                raise FileFormatError(
                    f"`{patch}` promises another result for `{name}` than it gives; ask its author"
                )
            return new

        left_out = write_like(out, base, tensors, tensors.specs, read)
        return Applied(root(digests), len(owners), len(tensors), left_out)


def write_like(
    out: Path,
    base: Path,
    tensors: ParamFiles,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
) -> list[str]:
    """Write a model in the layout of another; return which of its other files were left out.

    Args:
      out: a new .safetensors file, or a new or empty folder with the same files as `base` has.
      tensors: the opened `base`.
      specs, read: as for `write_file`, with the names of `tensors`.
    """
    if out.suffix == ".safetensors":
        metadata = next(iter(tensors.files.values())).metadata if len(tensors.files) == 1 else None
        steps = iter(track(range(len(specs)), description="writing"))
        write_file(out, specs, lambda name: (next(steps), read(name))[1], metadata)
        next(steps, None)
        return []
    with atomic_folder(out) as folder:
        left_out = _carry(base, folder, set(tensors.files)) if base.is_dir() else []
        for name, file in track(tensors.files.items(), description="writing files"):
            members = {n: specs[n] for n in file}
            write_file(folder / (name if base.is_dir() else SINGLE), members, read, file.metadata)
    return left_out


def _check_base(
    patch: str | os.PathLike, file: PatchFile, base: Path, tensors: ParamFiles, touched_only: bool
) -> dict[str, Digest]:
    """Return the digest of every tensor of the base, or raise if it is not the patch's base."""
    specs = tensors.specs
    for name, want in file.specs.items():
        if name not in specs:
            raise WrongBaseError(
                f"`{patch}` changes `{name}`, which `{base}` does not have; it is for another base"
            )
        if specs[name] != want:
            raise WrongBaseError(
                f"`{patch}` is for another base: `{name}` is {_describe(specs[name])} in `{base}`, "
                f"the patch wants {_describe(want)}"
            )
    digests: dict[str, Digest] = {}
    # Touched tensors first: a wrong base is then found before the rest is read.
    for name in track(sorted(specs, key=lambda n: (n not in file.specs, n)), description="checking the base"):
        digests[name] = leaf_digest(name, tensors[name])
        if file.base_digests.get(name, digests[name]) != digests[name]:
            raise WrongBaseError(
                f"`{patch}` is for another base: `{name}` of `{base}` has other values "
                f"({digests[name][:23]}, wanted {file.base_digests[name][:23]})"
            )
    if root(digests) != file.base_id and not touched_only:
        raise WrongBaseError(
            f"`{patch}` is for another base: `{base}` has the content id {root(digests)[:23]}, wanted "
            f"{file.base_id[:23]}. The tensors that it changes are the right ones; "
            "--touched-only (`touched_only=True`) accepts that"
        )
    return digests


def _carry(base: Path, folder: Path, weights: set[str]) -> list[str]:
    """Copy what is in a model's folder beside its weights; return what was not."""
    left_out: list[str] = []
    for top, folders, files in os.walk(base):
        here = Path(top).relative_to(base)
        for name in list(folders):
            if name.startswith(".") or Path(top, name).is_symlink():
                folders.remove(name)
                left_out.append(str(here / name))
            else:
                os.mkdir(folder / here / name)
        for name in files:
            path = Path(top, name)
            if here == Path() and name in weights:
                continue
            other_weights = path.suffix in (".safetensors", *REFUSED) or name.endswith(".index.json")
            other_weights &= (here / name) != Path(INDEX)
            if other_weights or not path.is_file() or not inside(path, base):
                left_out.append(str(here / name))
                continue
            shutil.copyfile(path, folder / here / name)
            sync(folder / here / name)
    return sorted(left_out)


def _describe(spec: Spec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"
