"""A small vision transformer for 8 x 8 digits: the model of the quickstart and of the tests.

Pre-norm blocks as in Dosovitskiy et al. 2020 (arXiv 2010.11929), the mean over patches in the place of
a class token. Batches are `{"image": float [B, 8, 8] in [0, 1], "label": int [B]}`.
"""

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fishjax.errors import UsageError
from fishjax.models._model import Model, in_order
from fishjax.types import Array

DEFAULTS = {
    "model_type": "fishjax_digits",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 640,
    "num_labels": 10,
}


class Attention(nn.Module):
    """Multi-head self-attention with kernels `[width, heads, head width]`."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)
        query, key, value = (nn.DenseGeneral(shape, name=n)(x) for n in ("query", "key", "value"))
        mixed = nn.dot_product_attention(query, key, value)
        return nn.DenseGeneral(width, axis=(-2, -1), name="output")(mixed)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and beside a residual."""

    heads: int
    inner: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x + Attention(self.heads, name="attention")(nn.LayerNorm(name="attention_norm")(x))
        h = nn.Dense(self.inner, name="mlp_in")(nn.LayerNorm(name="mlp_norm")(x))
        return x + nn.Dense(x.shape[-1], name="mlp_out")(nn.gelu(h))


class Embed(nn.Module):
    """Square patches of the image, projected, plus learned positions."""

    patch: int
    width: int

    @nn.compact
    def __call__(self, image: Array) -> Array:
        b, side, p = image.shape[0], image.shape[1] // self.patch, self.patch
        patches = image.reshape(b, side, p, side, p).swapaxes(2, 3).reshape(b, side * side, p * p)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, side * side, self.width))
        return nn.Dense(self.width, name="projection")(patches) + positions


class Head(nn.Module):
    """LayerNorm, mean over patches, one logit a class."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.classes, name="classifier")(nn.LayerNorm(name="norm")(x).mean(-2))


def build(config: dict[str, Any], names: Collection[str] | None = None) -> Model:
    """Return the model of a config; missing entries take the defaults (about 1 M parameters).

    >>> model = build({"model_type": "fishjax_digits", "num_hidden_layers": 1})
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, {"image": jnp.zeros((3, 8, 8))}).shape
    (3, 10)
    """
    del names
    c = {**DEFAULTS, **config}
    if c["image_size"] % c["patch_size"] or c["hidden_size"] % c["num_attention_heads"]:
        raise UsageError(
            "`patch_size` must divide `image_size` and `num_attention_heads` must divide `hidden_size`; "
            f"got {c['patch_size']}, {c['image_size']}, {c['num_attention_heads']}, {c['hidden_size']}"
        )
    embedding = Embed(c["patch_size"], c["hidden_size"])
    layer = Block(c["num_attention_heads"], c["intermediate_size"])
    top = Head(c["num_labels"])
    blocks = tuple(f"block_{i}" for i in range(c["num_hidden_layers"]))

    def init(key):
        keys = jax.random.split(key, len(blocks) + 2)
        side = c["image_size"]
        tokens = (side // c["patch_size"]) ** 2
        x = jnp.zeros((1, tokens, c["hidden_size"]))
        params = {"embed": embedding.init(keys[0], jnp.zeros((1, side, side)))["params"]}
        params |= {name: layer.init(k, x)["params"] for name, k in zip(blocks, keys[1:])}
        return params | {"head": top.init(keys[-1], x)["params"]}

    def embed(params, batch):
        return embedding.apply({"params": params["embed"]}, batch["image"])

    def block(name, params, carry):
        del name
        return layer.apply({"params": params}, carry)

    def head(params, carry):
        return top.apply({"params": params["head"]}, carry)

    return Model(
        family="fishjax_digits",
        config=c,
        init=init,
        apply=in_order(embed, block, head, blocks),
        task="class",
        labels=lambda example: example["label"],
        blocks=blocks,
        runs=(blocks,),
        embed=embed,
        block=block,
        head=head,
    )
