"""The loss and the logits of one example, which is what a Fisher is of."""

from fishjax.errors import UsageError
from fishjax.models._model import Model, outputs
from fishjax.types import Array, Example, LogitsFn, LossFn, Params


def example_loss(model: Model) -> LossFn:
    """Return the loss of ONE example in nats: -log p(labels | inputs), summed over its tokens.

    A label of -100 does not count. Without `labels`, a causal language model predicts `input_ids`.

    Raises:
      UsageError: as `example_logits`; or the example has no labels.

    >>> import jax, jax.numpy as jnp
    >>> from fishjax.models import build
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    >>> loss = example_loss(model)(params, {"input_ids": jnp.array([3, 1, 4])})
    >>> round(float(jnp.exp(loss / 2)))  # two next tokens, each one of 11
    11
    """
    import jax
    import jax.numpy as jnp

    from fishjax import tree

    logits_fn, labels_fn, mask_fn = example_logits(model), model.labels, model.token_mask
    assert labels_fn is not None

    def loss(params: Params, example: Example) -> Array:
        logits = logits_fn(params, example)
        log_p = jax.nn.log_softmax(logits.astype(tree.wide_dtype(logits.dtype)))
        labels = labels_fn(example)
        keep = jnp.full(labels.shape, True) if mask_fn is None else mask_fn(example)
        picked = jnp.take_along_axis(log_p, jnp.where(keep, labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(keep, picked, 0))

    return loss


def example_logits(model: Model) -> LogitsFn:
    """Return the logits of ONE example: `[C]`, or `[T, V]` of which `model.token_mask` counts some.

    Raises:
      UsageError: a model without a head that predicts labels, or with one whose loss is not that of classes.

    >>> import jax, jax.numpy as jnp
    >>> from fishjax.models import build
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params, example = model.init(jax.random.key(0)), {"input_ids": jnp.array([3, 1, 4])}
    >>> example_logits(model)(params, example).shape, model.token_mask(example)
    ((3, 11), Array([ True,  True, False], dtype=bool))
    """
    import jax

    if model.labels is None:
        raise UsageError(
            f"this `{model.family}` model has no head that predicts labels, so it has no loss and no logits; "
            "load a checkpoint with a language-model or classification head"
        )

    # One logit makes every label certain: the loss and the Fisher would be 0 and say nothing.
    kind = model.config.get("problem_type")
    classes = model.task in ("class", "tags")
    if classes and (outputs(model) == 1 or kind in ("regression", "multi_label_classification")):
        raise UsageError(
            f"this `{model.family}` has {outputs(model)} outputs and `problem_type` {kind!r}, so it does not "
            "choose one of several classes; write a loss of your own on `model.apply`"
        )

    def logits(params: Params, example: Example) -> Array:
        return model.apply(params, jax.tree.map(lambda x: x[None], example))[0]

    return logits
