"""T5 (arXiv 1910.10683): v1.0 and v1.1, so Flan, T0 and the LM-adapted checkpoints too."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from fishjax.errors import UsageError
from fishjax.models._assemble import NO_LABELS, assemble, required, shift_right
from fishjax.models._layers import (
    Embedding,
    Keys,
    Linear,
    RMSNorm,
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
    """What the modules need of config.json."""

    vocab: int
    width: int
    heads: int
    head_dim: int
    inner: int
    buckets: int
    max_distance: int
    eps: float
    act: str
    gated: bool
    tied: bool
    scaled: bool
    start: int


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the T5 that a config.json describes."""
    vocab, width, head_dim, inner, layers, heads = required(
        config, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"
    )
    gate, _, act = config.get("feed_forward_proj", "relu").rpartition("-")
    tie = config.get("tie_word_embeddings", True)
    pad = config.get("pad_token_id") or 0
    start = config.get("decoder_start_token_id")
    c = Config(
        vocab=vocab,
        width=width,
        heads=heads,
        head_dim=head_dim,
        inner=inner,
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        eps=config.get("layer_norm_epsilon", 1e-6),
        # In the gated form `gelu` has always meant its tanh approximation.
        act="gelu_new" if gate and act == "gelu" else act,
        gated=bool(gate),
        # transformers v5 forces `tie_word_embeddings` and renames what it used to mean; the file tells.
        tied=tie if names is None else "lm_head.weight" not in names,
        scaled=config.get("scale_decoder_outputs", tie),
        start=pad if start is None else start,
    )
    depth = config.get("num_decoder_layers")
    blocks: dict[str, nn.Module] = {f"encoder.block.{i}": EncoderBlock(c) for i in range(layers)}
    blocks["encoder.final_layer_norm"] = EncoderEnd(c)
    blocks |= {f"decoder.block.{i}": DecoderBlock(c) for i in range(layers if depth is None else depth)}
    return assemble(
        config,
        Embed(c),
        blocks,
        Head(c),
        labels="decoder",
        decoder_start=c.start,
        ignored=r"^(encoder|decoder)\.embed_tokens\.weight$",  # copies of `shared`
    )


class Embed(nn.Module):
    """Look up both inputs; the relative position biases of all blocks are made here, once."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, keys: Keys | None = None) -> dict[str, Any]:
        c = self.config
        shared = Embedding(c.vocab, c.width, std=1.0, name="shared")
        mask = batch.get("attention_mask")
        carry: dict[str, Any] = {"source": None if mask is None else jnp.asarray(mask).astype(bool)}
        if "input_ids" in batch:
            source = make_keys(batch["input_ids"], mask)
            carry |= {"encoder": shared(batch["input_ids"]), "encoder_keys": source}
            length = source.positions.shape[1]
            carry["encoder_bias"] = RelativeBias(c, True, name=TABLE.format("encoder"))(source, length)
        if "decoder_input_ids" in batch:
            ids = batch["decoder_input_ids"]
        elif "labels" in batch:
            ids = shift_right(batch["labels"], c.start)
        else:
            raise UsageError(NO_LABELS)
        keys = make_keys(ids, batch.get("decoder_attention_mask")) if keys is None else keys
        bias = RelativeBias(c, False, name=TABLE.format("decoder"))(keys, ids.shape[1])
        return {**carry, "x": shared(ids), "keys": keys, "bias": bias}


TABLE = "{}.block.0.layer.0.SelfAttention.relative_attention_bias"


class RelativeBias(nn.Module):
    """A learned bias for each head and each bucket of distances, `[B, H, T, S]`."""

    config: Config
    both_ways: bool

    @nn.compact
    def __call__(self, keys: Keys, length: int) -> Array:
        c = self.config
        weight = self.param("weight", nn.initializers.normal(0.1), (c.buckets, c.heads))
        apart = keys.positions[:, None, :] - keys.at_hand(length)[:, :, None]
        return jnp.moveaxis(jnp.take(weight, self.bucket(apart), axis=0), -1, 1)

    def bucket(self, apart: Array) -> Array:
        """Exact for near keys, logarithmic up to `max_distance`, the last bucket beyond."""
        c = self.config
        buckets, offset = c.buckets, jnp.zeros_like(apart)
        if self.both_ways:
            buckets //= 2
            offset, apart = jnp.where(apart > 0, buckets, 0), jnp.abs(apart)
        else:
            apart = jnp.maximum(-apart, 0)
        exact = buckets // 2
        ratio = jnp.log(jnp.maximum(apart, 1).astype(jnp.float32) / exact) / math.log(c.max_distance / exact)
        far = exact + (ratio * (buckets - exact)).astype(apart.dtype)
        return offset + jnp.where(apart < exact, apart, jnp.minimum(far, buckets - 1))


def attention(c: Config, name: str, x: Array, bias: Array | None, seen: Array, kv: Any) -> tuple[Array, Any]:
    """Attend from x; `kv(k, v)` makes keys and values out of two projections."""
    inner = c.heads * c.head_dim
    q = split_heads(Linear(inner, name=f"{name}.q")(x), c.heads)
    k, v = kv(*(Linear(inner, name=f"{name}.{n}") for n in "kv"))
    y = attend(q, k, v, seen, scale=1.0, bias=bias)
    return Linear(c.width, name=f"{name}.o")(y), (k, v)


def feed_forward(c: Config, layer: str, x: Array) -> Array:
    """x plus the feed-forward layer of it."""
    name = f"{layer}.DenseReluDense"
    h, act = RMSNorm(c.eps, name=f"{layer}.layer_norm")(x), activation(c.act)
    if c.gated:
        h = act(Linear(c.inner, name=f"{name}.wi_0")(h)) * Linear(c.inner, name=f"{name}.wi_1")(h)
    else:
        h = act(Linear(c.inner, name=f"{name}.wi")(h))
    return x + Linear(c.width, name=f"{name}.wo")(h)


class EncoderBlock(nn.Module):
    """Self-attention both ways, then the feed-forward layer."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], None]:
        c, x, keys = self.config, carry["encoder"], carry["encoder_keys"]
        h = RMSNorm(c.eps, name="layer.0.layer_norm")(x)
        both = lambda k, v: (split_heads(k(h), c.heads), split_heads(v(h), c.heads))
        seen = visible(keys, x.shape[1], causal=False)
        y, _ = attention(c, "layer.0.SelfAttention", h, carry["encoder_bias"], seen, both)
        return {**carry, "encoder": feed_forward(c, "layer.1", x + y)}, None


class EncoderEnd(nn.Module):
    """The norm between encoder and decoder."""

    config: Config

    def setup(self) -> None:
        self.norm = RMSNorm(self.config.eps)
        nn.share_scope(self, self.norm)

    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], None]:
        return {**carry, "encoder": self.norm(carry["encoder"])}, None


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder, then the feed-forward layer."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], Any]:
        c, x, keys = self.config, carry["x"], carry["keys"]
        cache = cache or {"self": None, "cross": None}
        h = RMSNorm(c.eps, name="layer.0.layer_norm")(x)

        def own(k: Linear, v: Linear) -> tuple[Array, Array]:
            return remember(cache["self"], split_heads(k(h), c.heads), split_heads(v(h), c.heads), keys.start)

        seen = visible(keys, x.shape[1], causal=True)
        y, left = attention(c, "layer.0.SelfAttention", h, carry["bias"], seen, own)
        x = x + y

        def encoded(k: Linear, v: Linear) -> tuple[Array, Array]:
            if cache["cross"] is not None:
                return cache["cross"]
            return split_heads(k(carry["encoder"]), c.heads), split_heads(v(carry["encoder"]), c.heads)

        h = RMSNorm(c.eps, name="layer.1.layer_norm")(x)
        source = carry["source"]
        if source is None:
            size = cache["cross"][0].shape[1] if cache["cross"] else carry["encoder"].shape[1]
            source = jnp.ones((x.shape[0], size), bool)
        seen = jnp.broadcast_to(source[:, None], (x.shape[0], x.shape[1], source.shape[1]))
        y, cross = attention(c, "layer.1.EncDecAttention", h, None, seen, encoded)
        return {**carry, "x": feed_forward(c, "layer.2", x + y)}, {"self": left, "cross": cross}


class Head(nn.Module):
    """The last norm and the logits, by the embedding where they are tied."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> Array:
        c = self.config
        x = RMSNorm(c.eps, name="decoder.final_layer_norm")(carry["x"])
        if c.scaled:
            x = x * c.width**-0.5
        return token_logits(x, c.vocab, "shared" if c.tied else None)
