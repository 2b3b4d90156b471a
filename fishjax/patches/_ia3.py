"""Scale: activations rescaled by learned vectors, folded into the weights ((IA)^3, arXiv 2205.05638)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves import Scaled, array
from fishjax.types import Array, Params


class KeysValues(NamedTuple):
    """The keys and values of an axis that holds queries, keys and values; an axis for `init_ia3`."""

    axis: int
    by_head: bool  # [head, (q, k, v), size of a head] as BLOOM has them, or [(q, k, v), all heads] as GPT-2


class Fused(NamedTuple):
    """Where a vector's entries lie on a longer axis `[groups, parts, size]`: in the parts from `first` on."""

    axis: int
    parts: int
    first: int
    size: int

    def spread(self, vector: Array) -> Array:
        """Return the vector on the whole axis, with ones in the parts that it is not about."""
        axis, shape = self.axis, vector.shape
        before, after = shape[:axis], shape[axis + 1 :]
        mine = vector.reshape(*before, -1, self.parts - self.first, self.size, *after)
        ones = jnp.ones((*before, mine.shape[axis], self.first, self.size, *after), vector.dtype)
        return jnp.concatenate([ones, mine], axis + 1).reshape(*before, -1, *after)


Axes = int | Sequence[int] | KeysValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """A weight times a vector that is broadcast over the axes that it does not scale."""

    vector: Array  # the weight's rank, 1 where nothing is scaled; `fused` says if one axis is in part
    # Leaves that the same vector scales too, such as the bias beside a weight: (name, shape to use).
    tied: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), metadata={"static": True})
    fused: Fused | tuple[int, int, int, int] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @property
    def factor(self) -> Array:
        """The vector as it broadcasts over the weight: its rank, 1 where nothing is scaled."""
        return self.vector if self.fused is None else Fused(*self.fused).spread(jnp.asarray(self.vector))

    @property
    def shape(self) -> tuple[int, ...]:
        """The factor's shape."""
        return jax.eval_shape(lambda: self.factor).shape if self.fused else tuple(self.vector.shape)

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None."""
        if self.fused is not None and (why := fused_problem(self.fused, self.vector.shape)):
            return why
        for other, shape in ((name, self.shape), *self.tied):
            if other not in leaves:
                return f"the tied leaf `{other}` is not there"
            if len(shape) != len(leaves[other].shape) or any(
                m not in (1, n) for m, n in zip(shape, leaves[other].shape)
            ):
                return f"a vector {list(shape)} does not broadcast to {tree.describe(leaves[other])}"
        return None

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaves that change, by name: one float32 multiply, one rounding."""
        folded, factor = {}, self.factor
        for other, shape in ((name, factor.shape), *self.tied):
            weight = leaves[other]
            wide = tree.wide_dtype(weight.dtype)
            vector = factor.reshape(shape).astype(wide)
            folded[other] = (weight.astype(wide) * vector).astype(weight.dtype)
        return folded

    def unfold(self, name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Return the leaves that change: a matrix as a leaf with this factor, biases folded."""
        small = {n: array(x) for n, x in leaves.items() if n != name or len(x.shape) < 2}
        factor = self.factor
        new = {} if name in small else {name: Scaled(leaves[name], factor, name=name)}
        for other, shape in ((name, factor.shape), *self.tied):
            if other in small:
                new |= Scale(factor.reshape(shape)).fold(other, small)
        return new


def init_ia3(
    params: Params, *, targets: str | Mapping[str, Axes], heads: int | None = None
) -> dict[str, Scale]:
    """Start an (IA)^3 patch: vectors of ones, so at the start it changes nothing.

    A leaf that is matched and has no axis but the scaled ones (a bias) shares the vector of the weight
    matched beside it in the same module: scaling an output scales its bias.

    Args:
      params: the base, leaves `[*p]`.
      targets: a family's preset (`"paper"`, `"peft"`), or `{regex of a leaf's name: axis or axes that
        are scaled}`: an output axis to scale what a layer gives, an input axis to scale what it takes;
        `KeysValues` for an axis that holds queries too, which then stay as they are.
      heads: how many there are; needed where an axis holds queries, keys and values by head (BLOOM).

    Raises:
      UsageError: a target matches no leaf, an axis is out of range, a bias could belong to several weights,
        or `heads` is missing or does not divide the axis.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.3.

    >>> params = {"k": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> patch = init_ia3(params, targets={"^k": -1})
    >>> patch["k.kernel"].vector.shape, patch["k.kernel"].tied
    ((1, 3), (('k.bias', (3,)),))
    """
    flat = tree.flatten(params)
    rules = _preset(targets, list(flat)) if isinstance(targets, str) else targets
    found = tree.match(list(rules.items()), flat)
    shapes = {n: _factor_shape(n, flat[n], axes) for n, axes in found.items()}
    tied: dict[str, list[tuple[str, tuple[int, ...]]]] = {n: [] for n in shapes}
    for name, shape in shapes.items():
        if 1 in shape and shape != flat[name].shape:
            continue  # a weight, which carries a vector of its own
        module = name.rpartition(".")[0]
        carriers = [
            n
            for n, s in shapes.items()
            if n.rpartition(".")[0] == module
            and flat[n].ndim > flat[name].ndim
            and [d for d in s if d != 1] == [d for d in shape if d != 1]
        ]
        if len(carriers) > 1:
            raise UsageError(f"`{name}` could share the vector of {carriers}; match one of them at a time")
        if carriers:
            tied[carriers[0]].append((name, shape))
            del tied[name]
    patch = {}
    for name, others in tied.items():
        shape, fused, axes = shapes[name], None, found[name]
        if isinstance(axes, KeysValues):
            fused = _keys_values(name, shape, axes, heads)
            shape = tuple(n * 2 // 3 if d == fused.axis else n for d, n in enumerate(shape))
        vector = jnp.ones(shape, tree.wide_dtype(flat[name].dtype))
        patch[name] = Scale(vector, tied=tuple(others), fused=fused)
    return patch


def fused_problem(fused: Sequence[int], shape: Sequence[int]) -> str | None:
    """Return why a vector of this shape does not lie on a longer axis as `fused` says, or None."""
    if len(fused) != 4 or not all(type(n) is int for n in fused):
        return f"`fused` must be four integers; got {fused}"
    axis, parts, first, size = fused
    if not (0 <= axis < len(shape) and 0 < first < parts and size > 0):
        return f"`fused` {tuple(fused)} describes no axis of a vector {list(shape)}"
    if shape[axis] % ((parts - first) * size):
        return f"{shape[axis]} entries are not whole groups of {parts - first} parts of {size}"
    return None


def _keys_values(name: str, shape: tuple[int, ...], axes: KeysValues, heads: int | None) -> Fused:
    axis = axes.axis % len(shape)
    if axes.by_head and heads is None:
        raise UsageError(
            f"`{name}` holds queries, keys and values head by head, and its shape {list(shape)} does not say "
            "how many heads; give `heads`"
        )
    groups = heads if axes.by_head and heads is not None else 1
    if groups < 1 or shape[axis] % (3 * groups):
        raise UsageError(f"`{name}` {list(shape)} does not hold q, k and v of {groups} heads on axis {axis}")
    return Fused(axis, 3, 1, shape[axis] // (3 * groups))


def _preset(name: str, leaf_names: list[str]) -> Mapping[str, Axes]:
    from fishjax.patches import _presets

    return _presets.ia3(leaf_names, name)


def _factor_shape(name: str, leaf: Array, axes: Axes) -> tuple[int, ...]:
    axes = [axes.axis] if isinstance(axes, KeysValues) else [axes] if isinstance(axes, int) else list(axes)
    if not all(-leaf.ndim <= a < leaf.ndim for a in axes):
        raise UsageError(f"axis {axes} is out of range for `{name}`, which is {tree.describe(leaf)}")
    scaled = {a % leaf.ndim for a in axes}
    return tuple(n if d in scaled else 1 for d, n in enumerate(leaf.shape))
