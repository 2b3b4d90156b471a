"""A Model out of three kinds of Linen modules: what embeds, one block after another, the head."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fishjax import tree
from fishjax.errors import FileFormatError, UsageError
from fishjax.models import _generate
from fishjax.models._model import Model, in_order
from fishjax.types import Array, Batch, Example, Params

NO_LABELS = "this model learns from labels and the examples have none; give `label`, `target` or `labels`"


def assemble(
    config: dict[str, Any],
    embed: nn.Module,
    blocks: Mapping[str, nn.Module],
    head: nn.Module,
    *,
    labels: str | None,
    decoder_start: int | None = None,
    ignored: str | None = None,
) -> Model:
    """Return the pure functions of a model.

    Args:
      embed: `(batch, keys=None) -> carry`, a dict with the hidden states in `x`.
      blocks: by dotted name; `(carry, cache=None) -> (carry, cache)`.
      head: `(carry) -> logits`.
      labels: `"next"` (causal language model), `"decoder"` (sequence to sequence), `"masked"`, `"tags"`
        (classes of tokens), `"class"` or None.
      decoder_start: the first token of a decoder that has an encoder.
    """

    def run_embed(params: Params, batch: Batch, keys: Any = None) -> Any:
        return embed.apply({"params": _by_module(params)}, batch, keys)

    def run_block(name: str, params: Params, carry: Any) -> Any:
        cache = carry.get("cache")
        rest = {n: x for n, x in carry.items() if n != "cache"}
        out, left = blocks[name].apply(
            {"params": _by_module(params)}, rest, cache.get(name) if cache else None
        )
        if cache is None:
            return out
        return {**out, "cache": cache if left is None else {**cache, name: left}}

    def run_head(params: Params, carry: Any) -> Array:
        return head.apply({"params": _by_module(params)}, carry)

    def init(key: Array) -> Params:
        batch = {"input_ids": jnp.zeros((1, 2), jnp.int32), "decoder_input_ids": jnp.zeros((1, 2), jnp.int32)}
        keys = iter(jax.random.split(key, len(blocks) + 2))
        carry, found = embed.init_with_output(next(keys), batch)
        flat = tree.flatten(found["params"])
        for name, module in blocks.items():
            (carry, _), found = _init(module, next(keys), carry)
            flat = {**{f"{name}.{n}": x for n, x in tree.flatten(found["params"]).items()}, **flat}
        found = head.init(next(keys), carry)
        return tree.nest({**tree.flatten(found.get("params", {})), **flat})

    generate = None
    if labels in ("next", "decoder"):
        generate = _generate.make(run_embed, run_block, run_head, blocks, config, decoder_start)
    return Model(
        family=config["model_type"],
        config=config,
        init=init,
        apply=in_order(run_embed, run_block, run_head, blocks),
        generate=generate,
        task=labels,
        labels=LABELS[labels] if labels else None,
        token_mask=TOKEN_MASKS.get(labels) if labels else None,
        blocks=tuple(blocks),
        runs=tuple(tuple(run) for _, run in itertools.groupby(blocks, key=blocks.__getitem__)),
        embed=run_embed,
        block=run_block,
        head=run_head,
        ignored=ignored,
    )


@functools.partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, key: Array, carry: Any) -> Any:
    """Start a module; equal ones, as most blocks of a model are, are traced and compiled once."""
    return module.init_with_output(key, carry)


def shift_right(labels: Array, start: int) -> Array:
    """Return the decoder's inputs for its labels `[..., T]`: one step later, -100 as the start token."""
    first = jnp.full((*labels.shape[:-1], 1), start, labels.dtype)
    moved = jnp.concatenate([first, labels[..., :-1]], axis=-1)
    return jnp.where(moved == -100, start, moved)


def required(config: Mapping[str, Any], *names: str) -> list[Any]:
    """Return sizes that a config.json must have.

    Raises:
      FileFormatError: one is missing, or is no size.
    """
    most = lambda name: 10_000 if "layer" in name or "head" in name else 1 << 31
    odd = [n for n in names if type(config.get(n)) is not int or not 0 < config[n] <= most(n)]
    if odd:
        text = ", ".join(f"`{n}` (got {config.get(n, 'nothing')!r})" for n in odd)
        raise FileFormatError(f"the config of a `{config['model_type']}` needs positive sizes: {text}")
    return [config[n] for n in names]


def first_of(config: Mapping[str, Any], *names: str) -> Any:
    """Return the first entry that a config.json has, of several names for one thing."""
    present = [n for n in names if config.get(n) is not None]
    return required(config, present[0] if present else names[0])[0]


def _by_module(params: Params) -> dict[str, Any]:
    """Group leaves by the dotted name of their module, which is how Linen holds them here."""
    modules: dict[str, Any] = {}
    for name, leaf in tree.flatten(params).items():
        module, _, last = name.rpartition(".")
        (modules.setdefault(module, {}) if module else modules)[last] = leaf
    return modules


def _next_labels(example: Example) -> Array:
    ids = jnp.asarray(example["labels"] if "labels" in example else example["input_ids"])
    return jnp.concatenate([ids[1:], jnp.full((1,), -100, ids.dtype)])


def _next_mask(example: Example) -> Array:
    count = _next_labels(example) >= 0
    if "labels" in example or "attention_mask" not in example:
        return count
    return count & jnp.append(jnp.asarray(example["attention_mask"])[1:] != 0, False)


def _labels(example: Example) -> Array:
    if "labels" not in example:
        raise UsageError(NO_LABELS)
    return jnp.asarray(example["labels"])


LABELS: dict[str, Callable[[Example], Array]] = {
    "next": _next_labels,
    "decoder": _labels,
    "masked": _labels,
    "tags": _labels,
    "class": _labels,
}
TOKEN_MASKS: dict[str, Callable[[Example], Array]] = {
    "next": _next_mask,
    "decoder": lambda example: _labels(example) >= 0,
    "masked": lambda example: _labels(example) >= 0,
    "tags": lambda example: _labels(example) >= 0,
}
