"""Rank classification: the choice that the model finds likeliest, and how accuracies are summed up."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import data
from fishjax.errors import UsageError
from fishjax.models import Model
from fishjax.train._choices import check_fields, score_choices
from fishjax.train._losses import length_normalised
from fishjax.types import Array, Batch, Params


def rank_classify(model: Model) -> Callable[[Params, Batch], Array]:
    """Return `classify(params, batch) -> int32 [B]`: the choice of least length-normalised -log p.

    The encoder runs once an example. Under `jit`, where contents are not known, -1 marks an example with a
    choice that has no tokens; else that is an error.

    Args:
      model: sequence to sequence.

    Raises:
      UsageError: as `score_choices`; of `classify`, an example has no choices, or a choice no tokens.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.2.

    >>> from fishjax import models
    >>> sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    >>> model = models.build({"model_type": "t5", **sizes})
    >>> batch = {"input_ids": jnp.array([[3, 1]]), "choices": jnp.array([[[2, 1], [4, -100]]])}
    >>> params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0)))
    >>> jax.jit(rank_classify(model))(params, batch).tolist()
    [0]
    """
    scores_of = score_choices(model)

    def one(params: Params, example: Batch) -> Array:
        scores = scores_of(params, example)
        nll = jnp.where(scores.valid, -length_normalised(scores), jnp.inf)
        return jnp.where(jnp.isnan(nll).any(), -1, jnp.argmin(nll)).astype(jnp.int32)

    def classify(params: Params, batch: Batch) -> Array:
        if not any(isinstance(x, jax.core.Tracer) for x in batch.values()):
            check_fields(batch, "input_ids", "choices")
            data.check_choices(batch)
        fields = ("input_ids", "attention_mask", "choices", "choice_mask")
        return jax.vmap(one, (None, 0))(params, {n: batch[n] for n in fields if n in batch})

    return classify


class Spread(NamedTuple):
    """The middle of several results and how far apart they are."""

    median: float
    iqr: float  # the third quartile less the first


def spread(values: Array) -> Spread:
    """Return median and interquartile range, over seeds and templates together as in T-Few's tables.

    Args:
      values: any shape, at least one, finite.

    Raises:
      UsageError: there is none, or one is not a number.

    >>> spread([[0.5, 0.6], [0.7, 0.8]])
    Spread(median=0.65, iqr=0.15)
    """
    flat = np.asarray(values, np.float64).ravel()
    if not flat.size or not np.isfinite(flat).all():
        raise UsageError(f"`values` must be numbers, at least one; got {flat[:8].tolist()}")
    low, median, high = np.quantile(flat, (0.25, 0.5, 0.75))
    return Spread(round(float(median), 12), round(float(high - low), 12))
