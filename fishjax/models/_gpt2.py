"""GPT-2: a decoder with learned positions, whose linear layers are stored `[in, out]`."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from fishjax.errors import UsageError
from fishjax.models._assemble import assemble, required
from fishjax.models._layers import (
    Embedding,
    Keys,
    LayerNorm,
    Linear,
    activation,
    attend,
    make_keys,
    remember,
    split_heads,
    token_logits,
    visible,
)
from fishjax.models._model import Model
from fishjax.types import Array, Batch


class Config(NamedTuple):
    """What the modules need of config.json and of the names in the file."""

    vocab: int
    width: int
    heads: int
    inner: int
    positions: int
    eps: float
    act: str
    prefix: str
    tied: bool


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the GPT-2 that a config.json describes."""
    vocab, width, layers, heads, positions = required(
        config, "vocab_size", "n_embd", "n_layer", "n_head", "n_positions"
    )
    c = Config(
        vocab=vocab,
        width=width,
        heads=heads,
        inner=config.get("n_inner") or 4 * width,
        positions=positions,
        eps=config.get("layer_norm_epsilon", 1e-5),
        act=config.get("activation_function", "gelu_new"),
        prefix="transformer." if names is None or any(n.startswith("transformer.") for n in names) else "",
        tied=names is None or "lm_head.weight" not in names,
    )
    scale = (width // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
    deep = config.get("scale_attn_by_inverse_layer_idx", False)
    return assemble(
        config,
        Embed(c),
        {f"{c.prefix}h.{i}": Block(c, scale / (i + 1) if deep else scale) for i in range(layers)},
        Head(c),
        labels="next",
        ignored=r"\.attn\.(masked_)?bias$",
    )


class Embed(nn.Module):
    """Tokens and learned positions."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, keys: Keys | None = None) -> dict[str, Any]:
        c, ids = self.config, batch["input_ids"]
        keys = make_keys(ids, batch.get("attention_mask")) if keys is None else keys
        if keys.positions.shape[1] > c.positions:
            raise UsageError(
                f"at most {c.positions} tokens have a position here; got {keys.positions.shape[1]}"
            )
        x = Embedding(c.vocab, c.width, name=f"{c.prefix}wte")(ids)
        x = x + Embedding(c.positions, c.width, name=f"{c.prefix}wpe")(keys.at_hand(ids.shape[1]))
        return {"x": x, "keys": keys}


class Block(nn.Module):
    """Causal attention, then the feed-forward layer."""

    config: Config
    scale: float

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], Any]:
        c, x, keys = self.config, carry["x"], carry["keys"]
        dense = lambda size, name: Linear(size, bias=True, transposed=True, name=name)
        h = dense(3 * c.width, "attn.c_attn")(LayerNorm(c.eps, name="ln_1")(x))
        q, k, v = (split_heads(y, c.heads) for y in jnp.split(h, 3, axis=-1))
        k, v = left = remember(cache and cache["self"], k, v, keys.start)
        y = attend(q, k, v, visible(keys, x.shape[1], causal=True), scale=self.scale)
        x = x + dense(c.width, "attn.c_proj")(y)
        h = activation(c.act)(dense(c.inner, "mlp.c_fc")(LayerNorm(c.eps, name="ln_2")(x)))
        return {**carry, "x": x + dense(c.width, "mlp.c_proj")(h)}, {"self": left}


class Head(nn.Module):
    """The last norm and the logits, by the embedding where they are tied."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> Array:
        c = self.config
        x = LayerNorm(c.eps, name=f"{c.prefix}ln_f")(carry["x"])
        return token_logits(x, c.vocab, f"{c.prefix}wte" if c.tied else None)
