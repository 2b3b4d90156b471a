"""What a model is here: pure functions over a parameter tree that is the checkpoint file."""

import functools
import importlib
import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from fishjax.errors import FileFormatError, FishjaxError, UsageError
from fishjax.types import Array, Batch, Example, Params, TokenMask

# A family is one file with `build(config, names) -> Model`: `config` is the content of config.json,
# `names` the tensor names in the checkpoint (None when there is no checkpoint yet).
FAMILIES: dict[str, str] = {
    "t5": "fishjax.models._t5",
    "bert": "fishjax.models._bert",
    "roberta": "fishjax.models._bert",
    "bloom": "fishjax.models._bloom",
    "llama": "fishjax.models._llama",
    "mistral": "fishjax.models._llama",
    "qwen2": "fishjax.models._llama",
    "qwen3": "fishjax.models._llama",
    "gemma2": "fishjax.models._llama",
    "gpt2": "fishjax.models._gpt2",
    "fishjax_digits": "fishjax.models._digits",
}


# What a config.json with strings for numbers, lists for objects and the like runs into.
WRONG_TYPES = (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError)


class Model(NamedTuple):
    """A family's pure functions for one config; nothing here holds parameters.

    Parameters may be leaves that are no arrays (`leaves.quantise`), in all functions.

    Fields:
      family: the `model_type` of config.json.
      config: the content of config.json.
      init: `init(key) -> params`, random, named and laid out as in the checkpoint.
      apply: `apply(params, batch) -> logits`: `[B, T, V]`, `[B, C]`, or hidden states of a bare encoder.
      generate: `generate(params, batch, *, max_new_tokens, temperature=0., key=None, patch=None)
        -> int32 [B, max_new_tokens]`, under a patch that is not folded, or one for each prompt of
        `patches.select`; None where the model has no decoder.
      task: what the labels are: `"next"` tokens, those of a `"decoder"`, `"masked"` tokens, `"tags"` of
        tokens or the `"class"` of an example; None where `apply` does not return logits, or nobody said.
      labels: one example -> int `[T]` or `[]`: what the logits of this example are compared to;
        None where `apply` does not return logits.
      token_mask: one example -> bool `[T]`: which of the `labels` count; None for classifiers.
      blocks: dotted names of the repeated parts, in the order in which they run.
      runs: the same names in the same order; blocks that follow each other and differ in nothing but their
        parameters are together (`scanned`).
      embed: `embed(params, batch) -> carry`, needs the parameters outside of the blocks only
        (and T5's tables of relative positions, which the file keeps in the first blocks).
      block: `block(name, params of this block, carry) -> carry`; where the carry of a decoder holds a
        dict `cache`, keys and values are read from it and remembered in it.
      head: `head(params, carry) -> logits`, needs the parameters outside of the blocks only.
      ignored: regex of tensor names that are no parameters (stored buffers); they are not loaded.
    """

    family: str
    config: dict[str, Any]
    init: Callable[[Array], Params]
    apply: Callable[[Params, Batch], Array]
    generate: Callable[..., Array] | None = None
    task: str | None = None
    labels: Callable[[Example], Array] | None = None
    token_mask: TokenMask | None = None
    blocks: tuple[str, ...] = ()
    runs: tuple[tuple[str, ...], ...] = ()
    embed: Callable[..., Any] | None = None
    block: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None
    ignored: str | None = None


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the model that a config.json describes; the same one for the same config.

    What was compiled for one folder's functions therefore serves another folder of the same config.

    Args:
      config: the content of config.json; `model_type` picks the family.
      names: tensor names in the checkpoint, where there is one: they tell heads, prefixes and ties.

    Raises:
      UsageError: an architecture that is not known here.

    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> model.blocks
    ('transformer.h.0',)
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(f"`{f}`" for f in FAMILIES)
        raise UsageError(f"`model_type` must be one of {known}; got `{family}`")
    return _build(json.dumps(config, sort_keys=True), None if names is None else frozenset(names))


@functools.lru_cache(maxsize=8)
def _build(text: str, names: frozenset[str] | None) -> Model:
    config = json.loads(text)
    family = config["model_type"]
    builder = importlib.import_module(FAMILIES[family]).build
    try:
        return _on_leaves(builder(config, names))
    except FishjaxError:
        raise
    except WRONG_TYPES as error:
        raise FileFormatError(
            f"the config of a `{family}` has an entry of a wrong kind: {error!r:.200}"
        ) from None


def _on_leaves(model: Model) -> Model:
    """Make a family's functions take parameters that are leaves."""
    import jax

    from fishjax import leaves

    jitted = jax.jit(leaves.interpret(model.apply))

    def apply(params: Params, batch: Batch) -> Array:
        with_leaves = any(map(leaves.is_leaf, jax.tree.leaves(params, is_leaf=leaves.is_leaf)))
        return (jitted if with_leaves else model.apply)(params, batch)

    parts: dict[str, Any] = {
        n: leaves.interpret(fn) for n in ("embed", "block", "head") if (fn := getattr(model, n))
    }
    return model._replace(apply=apply, **parts)


def in_order(embed: Callable, block: Callable, head: Callable, blocks: Collection[str]) -> Callable:
    """Return `apply(params, batch)`: what embeds, one block after another, the head."""

    def apply(params: Params, batch: Batch) -> Array:
        carry = embed(params, batch)
        for name in blocks:
            carry = block(name, subtree(params, name), carry)
        return head(params, carry)

    return apply


def subtree(params: Params, name: str) -> Params:
    """Return the part of a nested dict below a dotted name."""
    for part in name.split("."):
        params = params[part]
    return params


def num_labels(config: dict[str, Any]) -> int:
    """Return how many classes a config.json names; two where it does not say."""
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def outputs(model: Model) -> int:
    """Return the number of logits of a model that predicts labels: classes, or its vocabulary."""
    return num_labels(model.config) if model.task in ("tags", "class") else model.config["vocab_size"]


def end_ids(config: dict[str, Any]) -> list[int]:
    """Return the tokens after which a sequence has ended; a config names none, one or several."""
    ends = config.get("eos_token_id")
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
