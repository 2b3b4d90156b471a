"""Patch files merged into a patch file: by what they do together, or by the precision that they carry."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np

from fishjax import tree
from fishjax.checkpoint import load_params, load_patch, load_precision, save_patch
from fishjax.errors import UsageError
from fishjax.merge._information import Evidence, Information, add, information, resolve, revoke_rounded
from fishjax.merge._output import refuse_output
from fishjax.merge._patches import patches
from fishjax.merge._plan import File, open_tensors
from fishjax.merge._rule import number
from fishjax.merge._unpack import check_patches, is_patch, open_patch
from fishjax.types import Digest, Params


def patch_files(
    inputs: Sequence[File],
    out: File,
    *,
    base: File,
    weights: Any = None,
    scales: str = "deviations",
    rank: int | None = None,
) -> Digest:
    """Write the patch that does what several patch files do together; see `patches`.

    Args:
      inputs: patch files for the base.
      out: a new patch file.
      base: the model that they are for.
      weights, scales, rank: as for `patches`.

    Returns:
      The new file's own SHA-256.

    Raises:
      UsageError: an input is no patch; `out` exists; wrong weights, scales or rank.
      WrongBaseError: a patch is for another base.
    """
    params = _read_base(inputs, out, base)
    found = [load_patch(path)[0] for path in inputs]
    merged = patches(params, found, weights=weights, scales=scales, rank=rank)
    recipe = {"method": "patches", "weights": weights, "scales": scales, "rank": rank}
    return save_patch(out, merged, base=params, metadata={"recipe": recipe, "parents": _names(inputs)})


def information_files(
    inputs: Sequence[File],
    out: File,
    *,
    base: File,
    revoke: File | Sequence[File] | None = None,
    prior: float = 0.0,
    floor: float = 0.0,
) -> Digest:
    """Write the patch that several patch files with their precisions amount to, and its precision.

    Without prior and floor the result is a patch of the same kind: it merges with others, and contributions
    are taken out of it.

    Args:
      inputs: patch files for the base that carry a precision.
      out: a new patch file.
      base: the model that they are for.
      revoke: patch files that were merged before, whose contributions are taken out.
      prior, floor: as for `resolve`, one number for all entries.

    Returns:
      The new file's own SHA-256.

    Raises:
      UsageError: an input is no patch, or carries no precision; what is revoked was never merged; `out`
        exists; a negative prior or floor.
      WrongBaseError: a patch is for another base.
    """
    taken = [revoke] if isinstance(revoke, (str, os.PathLike)) else [] if revoke is None else revoke
    if not isinstance(taken, (list, tuple)) or not all(isinstance(p, (str, os.PathLike)) for p in taken):
        raise UsageError(f"`revoke` must be a patch file, or a list of them; got {revoke!r}")
    prior, floor = number("prior", prior, 0), number("floor", floor, 0)
    params = _read_base([*inputs, *taken], out, base)
    known = add(*(_information(path, params) for path in inputs))
    if taken:
        gone = add(*(_information(path, params) for path in taken))
        known = revoke_rounded(known, gone, _rounding(known, gone, params))
    known = {name: evidence for name, evidence in known.items() if evidence.indices.size}
    recipe = {"method": "information", "prior": prior, "floor": floor, "revoked": _names(taken)}
    return save_patch(
        out,
        resolve(params, known, prior=prior, floor=floor),
        base=params,
        precision=tree.nest({name: evidence.precision for name, evidence in known.items()}),
        metadata={"recipe": recipe, "parents": _names(inputs)},
    )


PATCH_METHODS: dict[str, Callable[..., Digest]] = {"patches": patch_files, "information": information_files}


def merge_patches(method: str, inputs: Sequence[File], out: File, **options: Any) -> Digest:
    """Write one patch by a method of `PATCH_METHODS`.

    Raises:
      UsageError: an option that the method does not know, or no base.
    """
    known = [n for n in inspect.signature(PATCH_METHODS[method]).parameters if n not in ("inputs", "out")]
    for option in options:
        if option not in known:
            raise UsageError(f"`{method}` has no option `{option}`; it has {', '.join(known)}")
    if "base" not in options:
        raise UsageError(f"`base` must be given: `{method}` merges patches for it")
    return PATCH_METHODS[method](inputs, out, **options)


def _read_base(inputs: Sequence[File], out: File, base: File) -> Params:
    """Return the base, after every check that all are patches for it and that the output is new."""
    for path in inputs:
        if not is_patch(path):
            raise UsageError(f"`{path}` is no patch file; this method merges patches")
    refuse_output(out, [*inputs, base])
    with ExitStack() as stack:
        origin = open_tensors(stack, base)
        check_patches([t for path in inputs for t in open_patch(path, origin).values()], map)
    return load_params(base)


def _information(path: File, params: Params) -> Information:
    """Return a patch file in information form."""
    (patch, metadata), precision = load_patch(path), load_precision(path)
    if lacking := sorted(set(patch) - set(precision)):
        raise UsageError(
            f"`{path}` carries no precision of `{lacking[0]}`; it is merged by `patches`; "
            "`contribute.run` and `checkpoint.save_patch` send one along with `precision=`"
        )
    recipe = metadata.get("recipe")
    if isinstance(recipe, Mapping) and (recipe.get("prior") or recipe.get("floor")):
        # To undo that by what a file says of itself would let its author move weights as far as he likes.
        raise UsageError(
            f"`{path}` was merged under a prior or floor, and moves less than its evidence; give its "
            "contributions, or what they merge to without either"
        )
    return information(params, patch, tree.nest(precision))


def _rounding(whole: Information, part: Information, params: Params) -> Information:
    """Return by how much the shifts in sums may be wrong, since files hold rounded values."""
    leaves, found = tree.flatten(params), {}
    for name, e in add(whole, part).items():
        leaf = np.asarray(leaves[name]).reshape(-1)
        eps = float(ml_dtypes.finfo(leaf.dtype).eps)
        wrong = eps * (e.precision * abs(leaf[e.indices].astype(np.float64)) + abs(e.shift))
        found[name] = Evidence(e.indices, np.zeros_like(wrong), wrong)
    return found


def _names(paths: Sequence[File]) -> list[str]:
    return [os.path.basename(path) for path in paths]
