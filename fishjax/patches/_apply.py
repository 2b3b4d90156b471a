"""What a patch means: `apply`, and the split into what is trained and what is not."""

from collections.abc import Mapping, Sequence

import jax

from fishjax import leaves, tree
from fishjax.errors import StructureError, UsageError
from fishjax.types import Params, Patch


def apply(params: Params, patch: Patch) -> Params:
    """Return the patched parameters; pure, jit-able and differentiable in the patch.

    Args:
      params: the base, any pytree with leaves `[*p]`; dtypes and shapes are kept. A quantised leaf that
        the patch changes becomes an array.
      patch: `{leaf name: kind}`.

    Raises:
      StructureError: the patch names a leaf that is not there, or does not fit it.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Sparse
    >>> patch = {"w": Sparse(jnp.array([1]), jnp.array([9.0]))}
    >>> apply({"w": jnp.array([1.0, 2.0])}, patch)["w"]
    Array([1., 9.], dtype=float32)
    """
    check(params, patch)
    flat = tree.flatten(params)
    folded: dict = {}
    for name, kind in patch.items():
        folded |= kind.fold(name, {n: leaves.array(flat[n]) for n in touched({name: kind})})
    return tree.rebuild(params, {**flat, **folded})


def compose(params: Params, patches: Sequence[Patch]) -> Params:
    """Apply patches one after another, left to right.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Scale
    >>> compose({"w": jnp.ones(2)}, [{"w": Scale(jnp.array([2.0, 3.0]))}] * 2)["w"]
    Array([4., 9.], dtype=float32)
    """
    for patch in patches:
        params = apply(params, patch)
    return params


def check(params: Params, patch: Patch) -> None:
    """Raise unless every entry of a patch fits a leaf, and no leaf is changed by two of them.

    Raises:
      StructureError: naming the leaf and both sides.
      UsageError: this is no patch.
    """
    if not isinstance(patch, Mapping):
        raise UsageError(
            f"a patch is {{leaf name: kind}}; got {type(patch).__name__}, see `patches.unfolded`"
        )
    flat = tree.flatten(params)
    seen: dict[str, str] = {}
    for name, kind in patch.items():
        if name not in flat:
            raise StructureError(f"the patch changes `{name}`, which the base does not have")
        if problem := kind.problem(name, flat):
            raise StructureError(f"the patch of `{name}` does not fit the base: {problem}")
        for other in touched({name: kind}):
            if other in seen:
                raise StructureError(
                    f"`{other}` is changed by both `{seen[other]}` and `{name}` of one patch"
                )
            seen[other] = name


def touched(patch: Patch) -> list[str]:
    """Return the names of the leaves that a patch changes, tied ones included."""
    return [n for name, kind in patch.items() for n in (name, *(t for t, _ in getattr(kind, "tied", ())))]


def partition(patch: Patch) -> tuple[Patch, Patch]:
    """Split a patch into what is trained (its inexact leaves) and what is fixed (indices).

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Sparse
    >>> trainable, fixed = partition({"w": Sparse(jnp.array([1]), jnp.array([9.0]))})
    >>> trainable["w"].indices, fixed["w"].values
    (None, None)
    """
    return tree.partition(patch, tree.is_inexact)


def combine(trainable: Patch, fixed: Patch) -> Patch:
    """Undo `partition`."""
    return tree.combine(trainable, fixed)


def num_parameters(patch: Patch) -> int:
    """Return how many numbers of a patch are trained.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Sparse
    >>> num_parameters({"w": Sparse(jnp.array([1, 4]), jnp.array([9.0, 8.0]))})
    2
    """
    return sum(x.size for x in jax.tree.leaves(patch) if tree.is_inexact(x))
