"""What is trained: each way starts a patch that changes nothing yet.

Each is called as `make(key, base, model, batches)` with batches of the contributor's own data.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishjax import checkpoint, data, fisher, leaves, masks, mesh, models, patches, tree
from fishjax.errors import UsageError, WrongBaseError
from fishjax.types import Array, Batch, Digest, LossFn, Mask, Params, Patch


class Made(NamedTuple):
    """A patch before training, and what is to be said of how it was chosen."""

    patch: Patch
    recipe: dict[str, Any]
    mask: Mask | None = None
    base_id: Digest | None = None  # of the base that the patch needs, for whoever knows the model's files


def fish(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    density: float,
    loss: Callable[[models.Model], LossFn] = models.example_loss,
    **rules,
) -> Made:
    """Choose the entries of largest empirical Fisher: the FISH mask; `rules` as in `masks.topk`.

    Args:
      loss: of a model, whose gradients are squared.
    """
    del key
    _check_floats(base)
    scores = fisher.estimate(_empirical(model, loss), base, batches)
    examples = sum(data.examples(batch) for batch in batches)
    recipe = {"method": "fish", "density": density, "estimator": "empirical", "examples": examples}
    return _masked(base, masks.topk(scores, density=density, **rules), recipe)


def random(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float, **rules
) -> Made:
    """Choose entries at random: the baseline that a FISH mask has to beat."""
    del model, batches
    _check_floats(base)
    mask = masks.random(key, base, density=density, **rules)
    return _masked(base, mask, {"method": "random", "density": density})


def magnitude(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float, **rules
) -> Made:
    """Choose the weights of largest absolute value."""
    del key, model, batches
    _check_floats(base)
    mask = masks.magnitude(base, density=density, **rules)
    return _masked(base, mask, {"method": "magnitude", "density": density})


def full(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    targets: str | Sequence[str] = "",
) -> Made:
    """Train whole leaves: everything, or those of some names (`"bias$"` is BitFit)."""
    del key, model, batches
    _check_floats(base)
    return Made(patches.init_dense(base, targets), {"method": "dense"})


def ia3(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    targets: str | Mapping[str, Any] = "paper",
) -> Made:
    """Rescale keys, values and the inner activations: (IA)^3."""
    del key, batches
    heads = model.config.get("n_head", model.config.get("num_attention_heads"))
    return Made(patches.init_ia3(base, targets=targets, heads=heads), {"method": "ia3"})


def lora(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    rank: int | Mapping[str, int],
    targets: str | Sequence[str] | Mapping[str, Any],
    alpha: float | Mapping[str, float] = 1.0,
    rslora: bool = False,
) -> Made:
    """Add low-rank products: LoRA."""
    del model, batches
    patch = patches.init_lora(key, base, rank=rank, targets=targets, alpha=alpha, rslora=rslora)
    return Made(patch, {"method": "lora", "rank": rank, "alpha": alpha, "rslora": rslora})


def from_patch(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, path: str | os.PathLike
) -> Made:
    """Go on from a patch file: few-shot training from (IA)^3 vectors that were pre-trained on a mixture.

    Quantised weights have another content id than those they stand for, so there only `base_id` is told.

    Raises:
      WrongBaseError: the file is for another base.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.4.
    """
    del key, model, batches
    patch, metadata = checkpoint.load_patch(path)
    wanted = found = checkpoint.read_patch(path).base_id
    if any(leaves.is_leaf(x) for x in tree.flatten(base).values()):
        if not all(isinstance(kind, (patches.Scale, patches.LowRank)) for kind in patch.values()):
            _check_floats(base)
    else:
        found = checkpoint.digest(base)
    if wanted != found:
        raise WrongBaseError(
            f"`{path}` is for another base: the model has the content id {found[:23]}, wanted {wanted[:23]}"
        )
    begun = metadata.get("recipe", {})
    recipe = {"method": begun.get("method"), "from": begun}
    return Made(jax.tree.map(jnp.asarray, patch), recipe, base_id=wanted)


def from_mask(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, path: str | os.PathLike
) -> Made:
    """Train the entries that a mask file keeps, as `fishjax mask` writes it.

    Raises:
      StructureError: the mask has other leaves, or of other shapes.
    """
    del key, model, batches
    _check_floats(base)
    mask, metadata = checkpoint.load_mask(path)
    return _masked(base, mask, {"method": "mask", "from": metadata.get("recipe", {})})


def _check_floats(base: Params) -> None:
    """Raise if a weight is quantised: it has no values that could be replaced, and another content id."""
    if odd := [n for n, x in tree.flatten(base).items() if leaves.is_leaf(x)]:
        raise UsageError(
            f"`{odd[0]}` and {len(odd) - 1} more are quantised; new values of weights need the floats. "
            "Leave out `quantise`, or train `ia3` or `lora`"
        )


def _empirical(model: models.Model, loss: Callable[[models.Model], LossFn]) -> fisher.FisherEstimator:
    """Return the estimator of before if it is for the same: refreshing a mask compiles nothing anew."""
    if not (_last and _last[0] is model and _last[1] is loss):
        _last[:] = model, loss, fisher.empirical(loss(model))
    return _last[2]


_last: list[Any] = []  # a model, a loss of it and their estimator


def _masked(base: Params, mask: Mask, recipe: dict[str, Any]) -> Made:
    here = mesh.gather((base, mask))  # of several processes, each holds the whole patch
    return Made(patches.init_sparse(*here), recipe, mask)
