"""LowRank: a weight plus a product of two thin factors (LoRA, arXiv 2106.09685)."""

import dataclasses
import math
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves import LowRank as Unfolded
from fishjax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A weight plus `scale * sum_r a * b`.

    The factors have the weight's own axes, 1 where a factor has none, and a trailing r; which axes are
    inputs and which outputs is therefore seen from their shapes.
    """

    a: Array  # [*p with 1 on output axes, r]
    b: Array  # [*p with 1 on input axes, r]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None."""
        a, b, shape = self.a.shape, self.b.shape, leaves[name].shape
        fits = len(a) == len(b) == len(shape) + 1 and a[-1] == b[-1]
        stacked = len(shape) > 2 and a[:1] == b[:1] == shape[:1]  # weights of equal blocks, each with its own
        if fits and all({x, y} == {1, n} for x, y, n in list(zip(a, b, shape))[stacked:]):
            return None
        return f"factors {list(a)} and {list(b)} do not span the leaf's shape {list(shape)}"

    def delta(self) -> Array:
        """Return `scale * sum_r a * b`, `[*p]`, in the factors' dtype."""
        axes = string.ascii_lowercase[: self.a.ndim - 1]
        in_a = "".join(c for c, n in zip(axes, self.a.shape) if n != 1)
        in_b = "".join(c for c, n in zip(axes, self.b.shape) if n != 1)
        out = "".join(c for c in axes if c in in_a or c in in_b)
        rank = self.a.shape[-1]
        a = self.a.reshape([n for n in self.a.shape[:-1] if n != 1] + [rank])
        b = self.b.reshape([n for n in self.b.shape[:-1] if n != 1] + [rank])
        delta = jnp.einsum(f"{in_a}z,{in_b}z->{out}", a, b)
        return self.scale * delta.reshape([max(m, n) for m, n in zip(self.a.shape, self.b.shape)][:-1])

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaves that change, by name; one rounding to the leaf's dtype."""
        weight, delta = leaves[name], self.delta()
        wide = tree.wide_dtype(np.result_type(weight.dtype, delta.dtype))
        return {name: (weight.astype(wide) + delta.astype(wide)).astype(weight.dtype)}

    def unfold(self, name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Return the leaf that changes as one with these factors."""
        return {name: Unfolded(leaves[name], self.a, self.b, self.scale, name=name)}


def init_lora(
    key: Array,
    params: Params,
    *,
    rank: int | Mapping[str, int],
    targets: str | Sequence[str] | Mapping[str, int | Sequence[int]],
    alpha: float | Mapping[str, float] = 1.0,
    rslora: bool = False,
) -> dict[str, LowRank]:
    """Start a low-rank patch: A random, B zero, so at the start it changes nothing.

    Args:
      key: a PRNG key.
      params: the base, leaves `[*p]` with at least two axes.
      rank: r, at least 1 and at most the smaller side of each target; or `{regex of a leaf's name: r}`,
        the first match wins, `""` matches all.
      targets: a family's preset, regexes of leaf names (the leading axis is the input, the
        others are outputs), or `{regex: input axis or axes}`.
      alpha: the product is scaled by `alpha / rank`; or by regexes in the same way.
      rslora: scale by `alpha / sqrt(rank)` instead, which keeps large ranks from learning slowly.

    Raises:
      UsageError: a target or regex matches no leaf, a target has no rank or alpha, or a rank does not fit.

    References: Hu et al. 2021, arXiv 2106.09685, eq. 3; Kalajdzievski 2023, arXiv 2312.03732.

    >>> patch = init_lora(jax.random.key(0), {"w": jnp.ones((4, 6))}, rank=2, targets="w")
    >>> patch["w"].a.shape, patch["w"].b.shape
    ((4, 1, 2), (1, 6, 2))
    """
    flat = tree.flatten(params)
    patch = {}
    chosen = tree.match(list(_rules(targets, list(flat)).items()), flat)
    ranks, alphas = _by_name("rank", rank, chosen), _by_name("alpha", alpha, chosen)
    for i, (name, axes) in enumerate(chosen.items()):
        weight, r = flat[name], ranks[name]
        inputs = {range(weight.ndim)[a] for a in ([axes] if isinstance(axes, int) else axes)}
        size_in = math.prod(n for d, n in enumerate(weight.shape) if d in inputs)
        size_out = math.prod(n for d, n in enumerate(weight.shape) if d not in inputs)
        if weight.ndim < 2 or len(inputs) == weight.ndim:
            raise UsageError(
                f"`{name}` is {tree.describe(weight)}; a low-rank patch needs inputs and outputs"
            )
        if not 1 <= r <= min(size_in, size_out):
            raise UsageError(f"`rank` must lie in [1, {min(size_in, size_out)}] for `{name}`; got {r}")
        a_shape = [n if d in inputs else 1 for d, n in enumerate(weight.shape)] + [r]
        b_shape = [1 if d in inputs else n for d, n in enumerate(weight.shape)] + [r]
        dtype = tree.wide_dtype(weight.dtype)
        a = jax.random.normal(jax.random.fold_in(key, i), a_shape, dtype) * size_in**-0.5
        scale = alphas[name] / (math.sqrt(r) if rslora else r)
        patch[name] = LowRank(a, jnp.zeros(b_shape, dtype), scale=scale)
    return patch


def _by_name(what: str, value: Any, chosen: Collection[str]) -> dict[str, Any]:
    """Return each target's own value, of one for all or of one for each regex."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(chosen, value)
    found = tree.match(list(value.items()), chosen)
    if missing := [n for n in chosen if n not in found]:
        raise UsageError(f'no regex of `{what}` matches the target `{missing[0]}`; add `""` for the others')
    return found


def _rules(targets, leaf_names: list[str]) -> dict[str, int | Sequence[int]]:
    if isinstance(targets, Mapping):
        return dict(targets)
    if targets in ("paper", "peft"):
        from fishjax.patches import _presets

        return dict(_presets.lora(leaf_names, targets))
    return dict.fromkeys([targets] if isinstance(targets, str) else targets, 0)
