"""How likely a sequence-to-sequence model finds each of an example's choices, token by token."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.models import Model
from fishjax.types import Array, Example, Params


class TokenScores(NamedTuple):
    """The tokens of one example's choices under a model."""

    log_p: Array  # [C, T], log p(y_t) in nats; 0 where there is no token
    log_not_p: Array  # [C, T], log(1 - p(y_t)); 0 where there is no token
    keep: Array  # bool [C, T]: where there is a token
    valid: Array  # bool [C]: the choices that the example has; the others are padding


def score_choices(model: Model) -> Callable[[Params, Example], TokenScores]:
    """Return a function that scores the choices of ONE example, running the encoder once.

    An example is `input_ids` `[S]`, where padded `attention_mask` `[S]`, and `choices`, int `[C, T]`: the
    tokens of each choice, then -100; `choice_mask`, bool `[C]`, is False for choices that are padding
    (absent: all count).

    Raises:
      UsageError: a model without an encoder and a decoder; of the result, an example without choices.

    >>> from fishjax import models
    >>> sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    >>> model = models.build({"model_type": "t5", **sizes})
    >>> params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0)))
    >>> example = {"input_ids": jnp.array([3, 1]), "choices": jnp.array([[2, 1], [4, -100]])}
    >>> scores = jax.jit(score_choices(model))(params, example)
    >>> jnp.exp(-scores.log_p).round().tolist()  # one of 7, and no token
    [[7.0, 7.0], [7.0, 1.0]]
    """
    if {name.split(".")[0] for name in model.blocks} != {"encoder", "decoder"}:
        raise UsageError(
            f"choices are scored by a sequence-to-sequence model (T5); this `{model.family}` has no encoder "
            "with a decoder"
        )

    def scores(params: Params, example: Example) -> TokenScores:
        check_fields(example, "input_ids", "choices")
        inputs = {n: example[n][None] for n in ("input_ids", "attention_mask") if n in example}
        choices = example["choices"]
        valid = example.get("choice_mask")
        valid = jnp.ones(choices.shape[0], bool) if valid is None else jnp.asarray(valid).astype(bool)

        # What depends on the inputs alone is not mapped, so encoder and cross-attention keys run once.
        def logits_of(labels: Array) -> Array:
            return model.apply(params, {**inputs, "labels": labels[None]})[0]

        logits = jax.vmap(logits_of)(choices)
        logits = logits.astype(tree.wide_dtype(logits.dtype))
        keep = (choices != -100) & valid[:, None]
        at = jnp.where(keep, choices, 0)[..., None]
        total = jax.nn.logsumexp(logits, axis=-1)
        log_p = jnp.take_along_axis(logits, at, axis=-1)[..., 0] - total
        # By the other tokens' logits: log(1 - p) from p would be infinite where p rounds to 1.
        tokens = jax.lax.broadcasted_iota(at.dtype, logits.shape, logits.ndim - 1)
        others = jnp.where(tokens == at, -jnp.inf, logits)
        log_not_p = jax.nn.logsumexp(others, axis=-1) - total
        return TokenScores(jnp.where(keep, log_p, 0), jnp.where(keep, log_not_p, 0), keep, valid)

    return scores


def check_fields(example: Example, *names: str) -> None:
    """Raise unless an example has these fields."""
    if missing := [n for n in names if n not in example]:
        there = ", ".join(f"`{n}`" for n in example)
        raise UsageError(
            f"`{missing[0]}` is missing from the examples, which have {there}; "
            "choices are ranked by `input_ids` and `choices`, and learnt with `answer`. Give `choices` and "
            "`answer` in each line, or `templates`; for examples without choices take `models.example_loss`"
        )
