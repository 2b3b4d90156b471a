"""The layers that families share, with parameters named and laid out as in a checkpoint.

A Linen submodule may have dots in its name, so a block names each layer as the file does
(`self_attn.q_proj`) and its parameters need no conversion table.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Return the activation that a config names."""
    if name not in ACTIVATIONS:
        raise UsageError(f"the activation must be one of {', '.join(ACTIVATIONS)}; got `{name}`")
    return ACTIVATIONS[name]


class Keys(NamedTuple):
    """The tokens that a decoder may attend to, and which of them are at hand.

    Positions are counted over real tokens, so padding on either side moves nothing.
    """

    positions: Array  # int [B, S]
    valid: Array  # bool [B, S]: padding is False
    start: Any = 0  # the slot of the first token at hand

    def at_hand(self, length: int) -> Array:
        """Return the positions of `length` tokens from `start`, int [B, length]."""
        return jax.lax.dynamic_slice_in_dim(self.positions, self.start, length, axis=1)


def make_keys(ids: Array, mask: Array | None) -> Keys:
    """Return the keys of whole sequences: ids `[B, T]`, mask `[B, T]` (None: no padding)."""
    valid = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    return Keys(jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0), valid)


def visible(keys: Keys, length: int, *, causal: bool, window: int | None = None) -> Array:
    """Return which keys each token at hand may see, bool `[B, length, S]`."""
    seen = keys.valid[:, None, :]
    if causal:
        apart = keys.at_hand(length)[:, :, None] - keys.positions[:, None, :]
        seen = seen & (apart >= 0)
        if window is not None:
            seen = seen & (apart < window)
    return jnp.broadcast_to(seen, (seen.shape[0], length, seen.shape[2]))


def remember(cache: tuple[Array, Array] | None, k: Array, v: Array, start: Any) -> tuple[Array, Array]:
    """Return keys and values `[B, S, K, D]`: the new ones, written into the cache where there is one."""
    if cache is None:
        return k, v
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    return write(cache[0], k), write(cache[1], v)


def attend(
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    *,
    scale: float,
    bias: Array | None = None,
    softcap: float | None = None,
) -> Array:
    """Return softmax(scale * q k^T + bias) v with shared key heads; softmax in float32 or wider.

    Args:
      q: `[B, T, H, D]`. k, v: `[B, S, K, D]`, where K divides H.
      seen: bool `[B, T, S]`. bias: `[B or 1, H, T, S]`.

    Returns:
      `[B, T, H * D]`.
    """
    (b, t, h, d), kv = q.shape, k.shape[2]
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, kv, h // kv, d), k)
    scores = widen(scores) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + widen(bias).reshape(bias.shape[0], kv, h // kv, *bias.shape[2:])
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(b, t, h * d)


def split_heads(x: Array, heads: int) -> Array:
    """Reshape `[B, T, H * D]` to `[B, T, H, D]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def widen(x: Array) -> Array:
    """Cast to float32, or keep a wider dtype."""
    return x.astype(tree.wide_dtype(x.dtype))


def _rows(x: Array, like: Array) -> Array:
    """Give a vector the rank of `like`, along its last axis."""
    return x.reshape((1,) * (like.ndim - 1) + x.shape)


class Linear(nn.Module):
    """x W^T + b with `weight` `[out, in]`, or x W + b with `[in, out]` (`transposed`, GPT-2's Conv1D)."""

    features: int
    bias: bool = False
    transposed: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features) if self.transposed else (self.features, x.shape[-1])
        weight = self.param("weight", nn.initializers.normal(self.std), shape)
        axis = 0 if self.transposed else 1
        y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (axis,)), ((), ())))
        if self.bias:
            y = y + _rows(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y


class Embedding(nn.Module):
    """Rows of `weight` `[V, D]`; an id outside [0, V) gives NaN. `attend` is the tied output layer."""

    size: int
    features: int
    std: float = 0.02

    def setup(self) -> None:
        self.weight = self.param("weight", nn.initializers.normal(self.std), (self.size, self.features))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.weight, ids, axis=0)

    def attend(self, x: Array) -> Array:
        return jax.lax.dot_general(x, self.weight, (((x.ndim - 1,), (1,)), ((), ())))


def token_logits(x: Array, size: int, tied: str | None) -> Array:
    """Return logits over `size` tokens: by the embedding of this name, or by `lm_head` (None)."""
    if tied is not None:
        return Embedding(size, x.shape[-1], name=tied).attend(x)
    return Linear(size, name="lm_head")(x)


class Bias(nn.Module):
    """A vector added along the last axis."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + _rows(self.param("bias", nn.initializers.zeros, (x.shape[-1],)), x)


class LayerNorm(nn.Module):
    """Centre and scale over the last axis, in float32 or wider."""

    eps: float
    legacy: bool = False  # old checkpoints say gamma and beta

    @nn.compact
    def __call__(self, x: Array) -> Array:
        names = ("gamma", "beta") if self.legacy else ("weight", "bias")
        weight = self.param(names[0], nn.initializers.ones, (x.shape[-1],))
        bias = self.param(names[1], nn.initializers.zeros, (x.shape[-1],))
        y = widen(x)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * widen(_rows(weight, y)) + widen(_rows(bias, y))).astype(x.dtype)


class RMSNorm(nn.Module):
    """Scale by the root mean square over the last axis, times `offset + weight`."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        weight = self.param("weight", start, (x.shape[-1],))
        y = widen(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * (self.offset + widen(_rows(weight, y)))).astype(x.dtype)


def rope_frequencies(config: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Return the angles per position `[head_dim / 2]` that a config describes, in either dialect.

    transformers v4 writes `rope_theta` and `rope_scaling`, v5 writes `rope_parameters`.

    Raises:
      UsageError: a kind of scaling that is not known here.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UsageError("`partial_rotary_factor` other than 1 is not known here")
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "default":
        return tuple(frequencies)
    factor = float(rope["factor"])
    if kind == "linear":
        return tuple(f / factor for f in frequencies)
    if kind != "llama3":
        raise UsageError(f"rope scaling must be default, linear or llama3; got `{kind}`")
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = rope["original_max_position_embeddings"]

    def scaled(f: float) -> float:
        turns = context * f / (2 * math.pi)  # of this angle within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return f * (smooth + (1 - smooth) / factor)

    return tuple(scaled(f) for f in frequencies)


def rotate(x: Array, positions: Array, frequencies: tuple[float, ...]) -> Array:
    """Turn `[B, T, H, D]` by its positions `[B, T]`; the two halves of D are the coordinates."""
    wide = widen(x)
    angles = positions[:, :, None].astype(wide.dtype) * jnp.asarray(frequencies, wide.dtype)[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
