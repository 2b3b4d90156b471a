"""What experiments on digits share: a small transformer, its trainings, accuracies, Fishers, Gram matrices.

Every function is compiled once, whatever the seed or the task.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fishjax import data, fisher, merge, models, patches, train
from fishjax.types import Batch, Fisher, Params

SPLITS = ("train", "validation", "test")
ESTIMATORS: dict[str, Callable[[models.Model], fisher.FisherEstimator]] = {
    "exact": lambda model: fisher.exact(models.example_logits(model)),
    "empirical": lambda model: fisher.empirical(models.example_loss(model)),
    "legacy_argmax": lambda model: fisher.legacy_argmax(models.example_logits(model)),
    "legacy_sqrt_sum": lambda model: fisher.legacy_sqrt_sum(models.example_logits(model)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The digits after some changes, one after the other."""

    name: str
    shifts: Sequence[Callable[[Batch], Batch]] = ()

    def of(self, digits: Batch) -> Batch:
        """Return the digits as they are in this task."""
        for shift in self.shifts:
            digits = shift(digits)
        return digits


class Lab(NamedTuple):
    """What a model on digits can do; parameters are numpy trees, so that merging them is exact and quick."""

    digits: Mapping[str, Batch]  # by split
    init: Callable[[int], Params]  # seed -> params
    tune: Callable[..., Params]  # (params, rows, *, steps, seed) -> params
    probabilities: Callable[[Params, Batch], np.ndarray]  # [B, C]
    accuracy: Callable[[Params, Batch], float]
    fisher: Callable[..., Fisher]  # (params, rows, estimator="exact")
    grams: Callable[[Params, Batch], dict[str, np.ndarray]]


def make(config: Mapping[str, Any], *, data_dir: str, learning_rate: float, batch_size: int) -> Lab:
    """Return the functions of a model.

    Args:
      config: of the digits transformer; missing entries take its defaults.
      data_dir: where TFDS keeps the digits.
      learning_rate: of Adam, constant.
      batch_size: at most; fewer where a training has fewer examples.
    """
    model = models.build({"model_type": "fishjax_digits", **config})
    optimizer = optax.adam(learning_rate)
    step = train.make_step(models.example_loss(model), optimizer)
    forward = jax.jit(lambda params, rows: jax.nn.softmax(model.apply(params, rows)))
    estimators = {name: make(model) for name, make in ESTIMATORS.items()}
    host = lambda params: jax.tree.map(np.asarray, params)

    def tune(params: Params, rows: Batch, *, steps: int, seed: int) -> Params:
        some = data.batches(rows, min(batch_size, data.examples(rows)), seed=seed, epochs=None)
        state = train.init(patches.init_dense(params, ""), optimizer)
        state, _ = train.fit(state, step, params, itertools.islice(some, steps), steps=steps)
        return host(patches.apply(params, train.patch_of(state)))

    def probabilities(params: Params, rows: Batch) -> np.ndarray:
        return np.asarray(forward(params, rows))

    def accuracy(params: Params, rows: Batch) -> float:
        return float((probabilities(params, rows).argmax(-1) == rows["label"]).mean())

    def estimate(params: Params, rows: Batch, estimator: str = "exact") -> Fisher:
        return host(
            fisher.estimate(estimators[estimator], params, data.batches(rows, min(64, data.examples(rows))))
        )

    return Lab(
        digits={s: data.load("bundled_digits", s, data_dir=data_dir) for s in SPLITS},
        init=lambda seed: host(model.init(jax.random.key(seed))),
        tune=tune,
        probabilities=probabilities,
        accuracy=accuracy,
        fisher=estimate,
        grams=lambda params, rows: merge.grams(model.apply, params, [rows], targets="kernel$"),
    )


def draw(rows: Batch, size: int, seed: int) -> Batch:
    """Return some examples, drawn without replacement."""
    return next(data.batches(rows, min(size, data.examples(rows)), seed=seed))
