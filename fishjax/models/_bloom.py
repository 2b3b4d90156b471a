"""BLOOM (arXiv 2211.05100): a decoder with ALiBi (arXiv 2108.12409) and fused queries, keys and values."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from fishjax.errors import UsageError
from fishjax.models._assemble import assemble, first_of, required
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
    widen,
)
from fishjax.models._model import Model
from fishjax.types import Array, Batch


class Config(NamedTuple):
    """What the modules need of config.json and of the names in the file."""

    vocab: int
    width: int
    heads: int
    eps: float
    prefix: str
    tied: bool


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the BLOOM that a config.json describes."""
    (vocab,) = required(config, "vocab_size")
    if config.get("apply_residual_connection_post_layernorm"):
        raise UsageError("`apply_residual_connection_post_layernorm` is not known here")
    c = Config(
        vocab=vocab,
        width=first_of(config, "hidden_size", "n_embed"),
        heads=first_of(config, "n_head", "num_attention_heads"),
        eps=config.get("layer_norm_epsilon", 1e-5),
        prefix="transformer." if names is None or any(n.startswith("transformer.") for n in names) else "",
        tied=names is None or "lm_head.weight" not in names,
    )
    layers = first_of(config, "n_layer", "num_hidden_layers")
    blocks = {f"{c.prefix}h.{i}": Block(c) for i in range(layers)}
    return assemble(config, Embed(c), blocks, Head(c), labels="next")


def slopes(heads: int) -> list[float]:
    """Return the ALiBi slope of each head: powers of 2^(-8/n), then what lies between."""
    n = 1 << (heads.bit_length() - 1)
    between = [2.0 ** (-4 / n * i) for i in range(1, 2 * (heads - n), 2)]
    return [2.0 ** (-8 / n * i) for i in range(1, n + 1)] + between


class Embed(nn.Module):
    """Look up the tokens and normalise; there are no positions but ALiBi's."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, keys: Keys | None = None) -> dict[str, Any]:
        c, ids = self.config, batch["input_ids"]
        x = Embedding(c.vocab, c.width, name=f"{c.prefix}word_embeddings")(ids)
        x = LayerNorm(c.eps, name=f"{c.prefix}word_embeddings_layernorm")(x)
        return {"x": x, "keys": make_keys(ids, batch.get("attention_mask")) if keys is None else keys}


class Block(nn.Module):
    """Causal attention, then the feed-forward layer."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], Any]:
        c, x, keys = self.config, carry["x"], carry["keys"]
        dense = lambda size, name: Linear(size, bias=True, name=name)
        h = LayerNorm(c.eps, name="input_layernorm")(x)
        # The rows of the fused weight are ordered [head, (query, key, value), size of a head].
        qkv = split_heads(dense(3 * c.width, "self_attention.query_key_value")(h), c.heads)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        k, v = left = remember(cache and cache["self"], k, v, keys.start)
        slope = jnp.asarray(slopes(c.heads), widen(x).dtype)
        bias = slope[None, :, None, None] * keys.positions[:, None, None, :].astype(slope.dtype)
        seen = visible(keys, x.shape[1], causal=True)
        y = attend(q, k, v, seen, scale=(c.width // c.heads) ** -0.5, bias=bias)
        x = x + dense(c.width, "self_attention.dense")(y)
        h = LayerNorm(c.eps, name="post_attention_layernorm")(x)
        h = activation("gelu_new")(dense(4 * c.width, "mlp.dense_h_to_4h")(h))
        return {**carry, "x": x + dense(c.width, "mlp.dense_4h_to_h")(h)}, {"self": left}


class Head(nn.Module):
    """The last norm and the logits, by the embedding where they are tied."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> Array:
        c = self.config
        x = LayerNorm(c.eps, name=f"{c.prefix}ln_f")(carry["x"])
        return token_logits(x, c.vocab, f"{c.prefix}word_embeddings" if c.tied else None)
