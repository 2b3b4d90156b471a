"""Scale: activations rescaled by learned vectors, folded into the weights ((IA)^3, arXiv 2205.05638)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.leaves import Scaled, array
from fishjax.types import Array, Params

Axes = int | Sequence[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """A weight times a vector that is broadcast over the axes that it does not scale."""

    vector: Array  # the weight's rank, 1 where nothing is scaled
    # Leaves that the same vector scales too, such as the bias beside a weight: (name, shape to use).
    tied: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), metadata={"static": True})

    def problem(self, name: str, leaves: Mapping[str, Array]) -> str | None:
        """Return why this does not fit the leaf, or None."""
        for other, shape in ((name, self.vector.shape), *self.tied):
            if other not in leaves:
                return f"the tied leaf `{other}` is not there"
            if len(shape) != len(leaves[other].shape) or any(
                m not in (1, n) for m, n in zip(shape, leaves[other].shape)
            ):
                return f"a vector {list(shape)} does not broadcast to {tree.describe(leaves[other])}"
        return None

    def fold(self, name: str, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the leaves that change, by name: one float32 multiply, one rounding."""
        folded = {}
        for other, shape in ((name, self.vector.shape), *self.tied):
            weight = leaves[other]
            wide = tree.wide_dtype(weight.dtype)
            vector = self.vector.reshape(shape).astype(wide)
            folded[other] = (weight.astype(wide) * vector).astype(weight.dtype)
        return folded

    def unfold(self, name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Return the leaves that change: a matrix as a leaf with this factor, biases folded."""
        small = {n: array(x) for n, x in leaves.items() if n != name or len(x.shape) < 2}
        new = {} if name in small else {name: Scaled(leaves[name], self.vector, name=name)}
        for other, shape in ((name, self.vector.shape), *self.tied):
            if other in small:
                new |= Scale(self.vector.reshape(shape)).fold(other, small)
        return new


def init_ia3(params: Params, *, targets: str | Mapping[str, Axes]) -> dict[str, Scale]:
    """Start an (IA)^3 patch: vectors of ones, so at the start it changes nothing.

    A leaf that is matched and has no axis but the scaled ones (a bias) shares the vector of the weight
    matched beside it in the same module: scaling an output scales its bias.

    Args:
      params: the base, leaves `[*p]`.
      targets: a family's preset (`"paper"`, `"peft"`), or `{regex of a leaf's name: axis or axes that
        are scaled}`: an output axis to scale what a layer gives, an input axis to scale what it takes.

    Raises:
      UsageError: a target matches no leaf, an axis is out of range, or a bias could belong to
        several weights.

    References: Liu et al. 2022, arXiv 2205.05638, section 3.3.

    >>> params = {"k": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> patch = init_ia3(params, targets={"^k": -1})
    >>> patch["k.kernel"].vector.shape, patch["k.kernel"].tied
    ((1, 3), (('k.bias', (3,)),))
    """
    flat = tree.flatten(params)
    rules = _preset(targets, list(flat)) if isinstance(targets, str) else targets
    shapes = {n: _vector_shape(n, flat[n], axes) for n, axes in tree.match(list(rules.items()), flat).items()}
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
    dtypes = {n: tree.wide_dtype(flat[n].dtype) for n in tied}
    return {n: Scale(jnp.ones(shapes[n], dtypes[n]), tied=tuple(t)) for n, t in tied.items()}


def _preset(name: str, leaf_names: list[str]) -> Mapping[str, Axes]:
    from fishjax.patches import _presets

    return _presets.ia3(leaf_names, name)


def _vector_shape(name: str, leaf: Array, axes: Axes) -> tuple[int, ...]:
    axes = [axes] if isinstance(axes, int) else list(axes)
    if not all(-leaf.ndim <= a < leaf.ndim for a in axes):
        raise UsageError(f"axis {axes} is out of range for `{name}`, which is {tree.describe(leaf)}")
    scaled = {a % leaf.ndim for a in axes}
    return tuple(n if d in scaled else 1 for d, n in enumerate(leaf.shape))
