"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692): bare, classifying, or filling masks."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from fishjax.errors import UsageError
from fishjax.models._assemble import assemble, required
from fishjax.models._layers import (
    Bias,
    Embedding,
    Keys,
    LayerNorm,
    Linear,
    activation,
    attend,
    split_heads,
    visible,
)
from fishjax.models._model import Model, num_labels
from fishjax.types import Array, Batch


class Config(NamedTuple):
    """What the modules need of config.json and of the names in the file."""

    vocab: int
    width: int
    heads: int
    inner: int
    positions: int
    types: int
    eps: float
    act: str
    prefix: str  # of every name but the classifier's
    classes: int | None  # of a classifier
    tokens: bool  # which classifies each token, not the sequence
    masked: bool  # a head that predicts tokens; without it and a classifier, hidden states come out
    pooler: bool
    next_sentence: bool  # a head left from pre-training, kept and not used
    legacy: bool  # norms called gamma and beta
    pad: int | None  # RoBERTa counts positions from here; None: BERT counts from 0


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the BERT or RoBERTa that a config.json describes."""
    vocab, width, layers, heads, inner, positions = required(
        config,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    )
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise UsageError("a BERT or RoBERTa must be an encoder with absolute positions")
    family = config["model_type"]
    architecture = next(iter(config.get("architectures") or []), "")
    if names is None:
        tokens, masked = "TokenClassification" in architecture, "MaskedLM" in architecture
        classify = tokens or "SequenceClassification" in architecture
        prefix = f"{family}." if classify or masked else ""
        pooler = not masked and not tokens and not (classify and family == "roberta")
    else:
        classify = any(n.startswith("classifier.") for n in names)
        masked = "lm_head.dense.weight" in names or "cls.predictions.transform.dense.weight" in names
        prefix = f"{family}." if any(n.startswith(f"{family}.") for n in names) else ""
        pooler = f"{prefix}pooler.dense.weight" in names
        # One layer on hidden states labels tokens; old files of such models have a pooler, unused.
        tokens = "classifier.weight" in names and (
            "TokenClassification" in architecture or not (pooler or "SequenceClassification" in architecture)
        )
        pooler |= classify and not tokens and family == "bert"  # what classifies a sequence there
    c = Config(
        vocab=vocab,
        width=width,
        heads=heads,
        inner=inner,
        positions=positions,
        types=config.get("type_vocab_size", 2),
        eps=config.get("layer_norm_eps", 1e-12),
        act=config.get("hidden_act", "gelu"),
        prefix=prefix,
        classes=num_labels(config) if classify else None,
        tokens=tokens,
        masked=masked,
        pooler=pooler,
        next_sentence=names is not None and "cls.seq_relationship.weight" in names,
        legacy=names is not None and f"{prefix}embeddings.LayerNorm.gamma" in names,
        pad=config.get("pad_token_id", 1) if family == "roberta" else None,
    )
    return assemble(
        config,
        Embed(c),
        {f"{prefix}encoder.layer.{i}": Block(c) for i in range(layers)},
        Head(c),
        labels="tags" if tokens else "class" if classify else "masked" if masked else None,
        # Stored buffers, and copies of the word embedding and its bias.
        ignored=r"(^|\.)embeddings\.(position_ids|token_type_ids)$|^(cls\.predictions|lm_head)\.decoder\.",
    )


class Embed(nn.Module):
    """Words, positions and segments, normalised."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, keys: Keys | None = None) -> dict[str, Any]:
        c, ids = self.config, jnp.asarray(batch["input_ids"])
        mask, types = batch.get("attention_mask"), batch.get("token_type_ids")
        if c.pad is None:
            first, positions = 0, jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        else:  # padding keeps the position `pad`, the first token has the next one
            first, real = c.pad + 1, (ids != c.pad).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + c.pad
        if ids.shape[1] > c.positions - first:
            raise UsageError(f"at most {c.positions - first} tokens have a position here; got {ids.shape[1]}")
        embed = lambda size, what: Embedding(size, c.width, name=f"{c.prefix}embeddings.{what}_embeddings")
        x = embed(c.vocab, "word")(ids) + embed(c.positions, "position")(positions)
        x = x + embed(c.types, "token_type")(jnp.zeros_like(ids) if types is None else jnp.asarray(types))
        valid = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
        x = LayerNorm(c.eps, c.legacy, name=f"{c.prefix}embeddings.LayerNorm")(x)
        return {"x": x, "keys": Keys(positions, valid)}


class Block(nn.Module):
    """Attention both ways and the feed-forward layer, each added and then normalised."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any], cache: Any = None) -> tuple[dict[str, Any], None]:
        c, x = self.config, carry["x"]
        q, k, v = (
            split_heads(Linear(c.width, bias=True, name=f"attention.self.{n}")(x), c.heads)
            for n in ("query", "key", "value")
        )
        seen = visible(carry["keys"], x.shape[1], causal=False)
        y = attend(q, k, v, seen, scale=(c.width // c.heads) ** -0.5)
        y = Linear(c.width, bias=True, name="attention.output.dense")(y)
        x = LayerNorm(c.eps, c.legacy, name="attention.output.LayerNorm")(x + y)
        y = activation(c.act)(Linear(c.inner, bias=True, name="intermediate.dense")(x))
        y = Linear(c.width, bias=True, name="output.dense")(y)
        return {**carry, "x": LayerNorm(c.eps, c.legacy, name="output.LayerNorm")(x + y)}, None


class Head(nn.Module):
    """Logits `[B, C]` of the first token, `[B, T, C]` or `[B, T, V]` of all; or hidden states."""

    config: Config

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> Array:
        c, x = self.config, carry["x"]
        first = x[:, 0]
        pooled = first
        if c.pooler:
            pooled = jnp.tanh(Linear(c.width, bias=True, name=f"{c.prefix}pooler.dense")(first))
        if c.next_sentence:
            Linear(2, bias=True, name="cls.seq_relationship")(pooled)
        if c.masked:
            head = ("cls.predictions", "transform.dense", "transform.LayerNorm")
            head = head if c.pad is None else ("lm_head", "dense", "layer_norm")
            h = activation(c.act if c.pad is None else "gelu")(
                Linear(c.width, bias=True, name=f"{head[0]}.{head[1]}")(x)
            )
            h = LayerNorm(c.eps, c.legacy, name=f"{head[0]}.{head[2]}")(h)
            logits = Embedding(c.vocab, c.width, name=f"{c.prefix}embeddings.word_embeddings").attend(h)
            return Bias(name=head[0])(logits)
        if c.classes is None:
            return x
        if c.tokens or c.pad is None:
            return Linear(c.classes, bias=True, name="classifier")(x if c.tokens else pooled)
        h = jnp.tanh(Linear(c.width, bias=True, name="classifier.dense")(first))
        return Linear(c.classes, bias=True, name="classifier.out_proj")(h)
