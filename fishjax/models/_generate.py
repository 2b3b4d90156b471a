"""Greedy and sampled generation with a cache of keys and values, all of it under `jit`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fishjax import leaves, patches, tree
from fishjax.errors import UsageError
from fishjax.models._layers import make_keys
from fishjax.models._model import end_ids, subtree
from fishjax.types import Array, Batch, Params


def make(
    embed: Callable[..., Any],
    block: Callable[..., Any],
    head: Callable[..., Any],
    blocks: Iterable[str],
    config: dict[str, Any],
    decoder_start: int | None,
) -> Callable[..., Array]:
    """Return a model's `generate`."""
    parts = (embed, block, head)
    ends = end_ids(config)
    pad = config.get("pad_token_id")
    pad = pad if pad is not None else ends[0] if ends else 0
    name_of_ids = "input_ids" if decoder_start is None else "decoder_input_ids"

    def next_token(logits: Array, temperature: Array, key: Array | None, step: Any) -> Array:
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, step), logits / temperature.astype(logits.dtype)
        )
        return drawn.astype(jnp.int32)

    def ended(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(ends, jnp.int32)) if ends else jnp.zeros(token.shape, bool)

    @partial(jax.jit, static_argnames="steps")
    @leaves.interpret
    def run(
        params: Params, patch: Any, batch: Batch, temperature: Array, key: Array | None, *, steps: int
    ) -> Array:
        embed, block, head = _patched(parts, params, patch)
        mask = batch.get("attention_mask")
        if decoder_start is not None:
            start = jnp.full((batch["input_ids"].shape[0], 1), decoder_start, jnp.int32)
            batch, mask = {**batch, name_of_ids: start}, None
        prompt = make_keys(batch[name_of_ids], mask)
        (rows, length), count = prompt.valid.shape, prompt.valid.sum(1, dtype=jnp.int32)

        # The prompt, once; what it leaves behind becomes a cache with room for the new tokens.
        carry = {**embed(batch), "cache": {}}
        for name in blocks:
            carry = block(name, carry)
        room = lambda x: jnp.pad(x, ((0, 0), (0, steps), (0, 0), (0, 0)))
        cache = {n: {**held, "self": jax.tree.map(room, held["self"])} for n, held in carry["cache"].items()}
        last = length - 1 - jnp.argmax(prompt.valid[:, ::-1], axis=1)
        x = jnp.take_along_axis(carry["x"], last[:, None, None], axis=1)
        token = next_token(head({**carry, "x": x})[:, 0], temperature, key, 0)

        later = count[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
        keys = prompt._replace(
            positions=jnp.concatenate([prompt.positions, later], axis=1),
            valid=jnp.concatenate([prompt.valid, jnp.ones((rows, steps), bool)], axis=1),
        )
        rest = {n: x for n, x in batch.items() if n == "attention_mask"}

        def more(state: Any) -> Array:
            step, _, done, _, _ = state
            return (step < steps) & ~done.all()

        def advance(state: Any) -> Any:
            step, token, done, cache, out = state
            here = keys._replace(start=length + step - 1)
            carry = {**embed({**rest, name_of_ids: token[:, None]}, here), "cache": cache}
            for name in cache:
                carry = block(name, carry)
            token = next_token(head(carry)[:, 0], temperature, key, step)
            out = out.at[:, step].set(jnp.where(done, pad, token))
            return step + 1, token, done | ended(token), carry["cache"], out

        out = jnp.full((rows, steps), pad, jnp.int32).at[:, 0].set(token)
        return jax.lax.while_loop(more, advance, (jnp.int32(1), token, ended(token), cache, out))[-1]

    def generate(
        params: Params,
        batch: Batch,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        key: Array | None = None,
        patch: Any = None,
    ) -> Array:
        """Continue a batch of prompts; int32 `[B, max_new_tokens]`, the new tokens only.

        Args:
          batch: `input_ids` `[B, T]` and, where rows are padded, `attention_mask`.
          max_new_tokens: at least 1. After end of sequence comes the pad token.
          temperature: 0 takes the likeliest token; above it tokens are sampled with `key`.
          patch: run under a patch that is not folded; or under one for each prompt, of `patches.select`.

        Raises:
          UsageError: an argument out of range, or a temperature without a key.
        """
        if max_new_tokens < 1:
            raise UsageError(f"`max_new_tokens` must be at least 1; got {max_new_tokens}")
        if temperature < 0 or (temperature > 0 and key is None):
            raise UsageError(
                f"`temperature` must be 0, or positive with a `key`; got {temperature} and key={key}"
            )
        batch = {n: jnp.asarray(batch[n]) for n in ("input_ids", "attention_mask") if n in batch}
        drawn = key if temperature > 0 else None
        return run(params, patch, batch, jnp.float32(temperature), drawn, steps=max_new_tokens)

    return generate


def _patched(parts: Any, params: Params, patch: Any) -> Any:
    """Return `embed(batch, keys)`, `block(name, carry)` and `head(carry)` under a patch.

    Each part runs un-folded by itself. So with a patch for each prompt the loop over tokens, its caches
    and its counter stay one for all prompts: none waits for another's end, none copies its cache.
    """
    embed, block, head = parts
    if patch is None:
        return (
            partial(embed, params),
            lambda name, carry: block(name, subtree(params, name), carry),
            partial(head, params),
        )

    def one_block(name: str, carry: Any) -> Any:
        below = lambda leaf: leaf.startswith(f"{name}.")
        mine = tree.nest({n: x for n, x in tree.flatten(params).items() if below(n)})
        cache = carry["cache"]
        run = patches.unfolded(lambda params, carry: block(name, subtree(params, name), carry))
        held = {n: x for n, x in cache.items() if n == name}
        out = run(mine, patches.part(patch, below), {**carry, "cache": held})
        return {**out, "cache": {**cache, **out["cache"]}}

    return (
        partial(patches.unfolded(embed), params, patch),
        one_block,
        partial(patches.unfolded(head), params, patch),
    )
