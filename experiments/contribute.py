"""Ways to make a patch: each chooses what is trained, and starts it as a change of nothing.

All are called as `make(key, base, model, batches)`; `batches` are of the contributor's own world.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from fishjax import data, fisher, masks, models, patches, train
from fishjax.types import Array, Batch, Mask, Params, Patch


class Made(NamedTuple):
    """A patch before training, and what is to be said of how it was chosen."""

    patch: Patch
    recipe: dict[str, Any]
    mask: Mask | None = None


def fish(key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float) -> Made:
    """Choose the entries of largest empirical Fisher: the FISH mask."""
    del key
    scores = fisher.estimate(fisher.empirical(models.example_loss(model)), base, batches)
    recipe = {"method": "fish", "density": density, "estimator": "empirical", "examples": _count(batches)}
    return _masked(base, masks.topk(scores, density=density), recipe)


def random(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float
) -> Made:
    """Choose entries at random: the baseline that a FISH mask has to beat."""
    del model, batches
    return _masked(base, masks.random(key, base, density=density), {"method": "random", "density": density})


def magnitude(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, density: float
) -> Made:
    """Choose the largest weights."""
    del key, model, batches
    mask = masks.magnitude(base, density=density)
    return _masked(base, mask, {"method": "magnitude", "density": density})


def full(key: Array, base: Params, model: models.Model, batches: Sequence[Batch]) -> Made:
    """Train everything."""
    del key, model, batches
    return Made(patches.init_dense(base), {"method": "full", "density": 1.0})


def ia3(
    key: Array, base: Params, model: models.Model, batches: Sequence[Batch], *, targets: Mapping[str, Any]
) -> Made:
    """Rescale keys, values and the inner activations: (IA)^3."""
    del key, model, batches
    return Made(patches.init_ia3(base, targets=targets), {"method": "ia3"})


def lora(
    key: Array,
    base: Params,
    model: models.Model,
    batches: Sequence[Batch],
    *,
    rank: int,
    targets: Mapping[str, Any],
    alpha: float = 1.0,
) -> Made:
    """Add low-rank products: LoRA."""
    del model, batches
    patch = patches.init_lora(key, base, rank=rank, targets=targets, alpha=alpha)
    return Made(patch, {"method": "lora", "rank": rank, "alpha": alpha})


def fit(
    patch: Patch,
    base: Params,
    model: models.Model,
    rows: Batch,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
    description: str = "training",
) -> Patch:
    """Train a patch by Adam with a tenth of the steps as warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
    optimizer = optax.adam(schedule)
    state, _ = train.fit(
        train.init(patch, optimizer),
        train.make_step(models.example_loss(model), optimizer),
        base,
        data.batches(rows, batch_size, seed=seed, epochs=None),
        steps=steps,
        description=description,
    )
    return train.patch_of(state)


def key_of(seed: int, *path: int) -> Array:
    """Return the key of one use of randomness under a seed."""
    key = jax.random.key(seed)
    for number in path:
        key = jax.random.fold_in(key, number)
    return key


def _masked(base: Params, mask: Mask, recipe: dict[str, Any]) -> Made:
    return Made(patches.init_sparse(base, mask), recipe, mask)


def _count(batches: Sequence[Batch]) -> int:
    return sum(data.examples(batch) for batch in batches)
