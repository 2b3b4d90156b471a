"""Llama and what was made of it: Llama 3, Mistral, Qwen2, Qwen3, Gemma 2. One decoder, a few flags."""

from collections.abc import Collection
from typing import Any, NamedTuple

from flax import linen as nn

from fishjax.models._assemble import assemble, required
from fishjax.models._layers import (
    Embedding,
    Keys,
    Linear,
    RMSNorm,
    activation,
    attend,
    make_keys,
    remember,
    rope_frequencies,
    rotate,
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
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    frequencies: tuple[float, ...]
    scale: float  # of the attention scores
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3
    gemma: bool = False  # norms count from 1, scaled embedding, a norm after each part too
    softcap: float | None = None  # Gemma 2, of the attention scores
    final_softcap: float | None = None


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the decoder that a config.json describes."""
    vocab, width, inner, layers, heads = required(
        config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    family = config["model_type"]
    gemma, bias = family == "gemma2", bool(config.get("attention_bias", False))
    size = config.get("head_dim") or {"qwen3": 128, "gemma2": 256}.get(family, width // heads)
    (head_dim,) = required({**config, "head_dim": size}, "head_dim")
    act = config.get("hidden_activation") if gemma else None
    tied = config.get("tie_word_embeddings", gemma) and (names is None or "lm_head.weight" not in names)
    c = Config(
        vocab=vocab,
        width=width,
        inner=inner,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        eps=config.get("rms_norm_eps", 1e-6),
        act=act or config.get("hidden_act", "silu"),
        frequencies=rope_frequencies(config, head_dim),
        scale=(config.get("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
        tied=tied,
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        gemma=gemma,
        softcap=config.get("attn_logit_softcapping", 50.0) if gemma else None,
        final_softcap=config.get("final_logit_softcapping", 30.0) if gemma else None,
    )
    windows = sliding_windows(config, layers)
    return assemble(
        config,
        Embed(c),
        {f"model.layers.{i}": Block(c, windows[i]) for i in range(layers)},
        Head(c),
        labels="next",
        ignored=r"rotary_emb\.inv_freq$",
    )


def sliding_windows(config: dict[str, Any], layers: int) -> list[int | None]:
    """Return how many tokens back each layer sees, itself included; None: all of them."""
    family = config["model_type"]
    window = config.get("sliding_window", 4096 if family in ("mistral", "gemma2") else None)
    if family == "llama" or (family.startswith("qwen") and not config.get("use_sliding_window", False)):
        return [None] * layers
    if types := config.get("layer_types"):
        return [window if t == "sliding_attention" else None for t in types]
    if family == "gemma2":
        return [None if i % 2 else window for i in range(layers)]
    first = config.get("max_window_layers", 28) if family.startswith("qwen") else 0
    return [window if i >= first else None for i in range(layers)]


class Embed(nn.Module):
    """Look up the tokens; positions are turned into angles by each block."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, keys: Keys | None = None) -> dict[str, Any]:
        c, ids = self.config, batch["input_ids"]
        x = Embedding(c.vocab, c.width, name="model.embed_tokens")(ids)
        if c.gemma:
            x = x * x.dtype.type(c.width**0.5)
        return {"x": x, "keys": make_keys(ids, batch.get("attention_mask")) if keys is None else keys}


class Block(nn.Module):
    """Causal attention with shared key heads, then the gated feed-forward layer."""

    config: Config
    window: int | None

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], Any]:
        c, x, keys = self.config, carry["x"], carry["keys"]
        norm = lambda name: RMSNorm(c.eps, offset=1.0 if c.gemma else 0.0, name=name)

        def heads(count: int, what: str, h: Array) -> Array:
            y = Linear(count * c.head_dim, bias=c.qkv_bias, name=f"self_attn.{what}_proj")(h)
            return split_heads(y, count)

        h = norm("input_layernorm")(x)
        q, k, v = heads(c.heads, "q", h), heads(c.kv_heads, "k", h), heads(c.kv_heads, "v", h)
        if c.qk_norm:
            q, k = norm("self_attn.q_norm")(q), norm("self_attn.k_norm")(k)
        now = keys.at_hand(x.shape[1])
        q, k = rotate(q, now, c.frequencies), rotate(k, now, c.frequencies)
        k, v = left = remember(cache and cache["self"], k, v, keys.start)
        seen = visible(keys, x.shape[1], causal=True, window=self.window)
        y = attend(q, k, v, seen, scale=c.scale, softcap=c.softcap)
        y = Linear(c.width, bias=c.out_bias, name="self_attn.o_proj")(y)
        if c.gemma:
            y = norm("post_attention_layernorm")(y)
        x = x + y

        h = norm("pre_feedforward_layernorm" if c.gemma else "post_attention_layernorm")(x)
        project = lambda size, what: Linear(size, bias=c.mlp_bias, name=f"mlp.{what}_proj")
        h = activation(c.act)(project(c.inner, "gate")(h)) * project(c.inner, "up")(h)
        y = project(c.width, "down")(h)
        if c.gemma:
            y = norm("post_feedforward_layernorm")(y)
        return {**carry, "x": x + y}, {"self": left}


class Head(nn.Module):
    """The last norm and the logits, by the embedding where they are tied."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> Array:
        c = self.config
        x = RMSNorm(c.eps, offset=1.0 if c.gemma else 0.0, name="model.norm")(carry["x"])
        logits = token_logits(x, c.vocab, "model.embed_tokens" if c.tied else None)
        return logits if c.final_softcap is None else c.final_softcap * nn.tanh(logits / c.final_softcap)
