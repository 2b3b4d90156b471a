"""Run a function on patched parameters without ever forming the patched weights."""

from collections.abc import Callable
from typing import Any

from fishjax import leaves, tree
from fishjax.patches._apply import check
from fishjax.patches._ia3 import Scale
from fishjax.patches._lora import LowRank
from fishjax.types import Params, Patch


def unfolded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `g` with `g(params, patch, *args) == fn(patches.apply(params, patch), *args)`.

    Where a weight with a `Scale` or `LowRank` patch is used in a matmul or a row lookup, the activations
    are scaled or take the thin detour instead, so no gradient of the weight's size is formed when the
    patch is trained. Where it is used in a way without such a rule, the weight is folded there: right
    everywhere, and `unfolded_report` tells. Vectors (biases) and the other kinds are folded.

    Args:
      fn: any JAX function whose first argument is the parameters. Like a function under `jit`, it sees
        tracers.

    Raises:
      StructureError: the patch names a leaf that is not there, or does not fit it.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Scale
    >>> params, patch = {"w": jnp.ones((2, 3))}, {"w": Scale(jnp.array([[1.0, 2.0, 3.0]]))}
    >>> unfolded(lambda params, x: x @ params["w"])(params, patch, jnp.ones(2)).tolist()
    [2.0, 4.0, 6.0]

    References: Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    def g(params: Params, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        return leaves.interpret(fn)(_patched(params, patch), *args, **kwargs)

    return g


def unfolded_report(fn: Callable[..., Any]) -> Callable[..., list[str]]:
    """Return a function of the arguments of `unfolded(fn)` that lists which weights it folds, and for what.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Scale
    >>> params, patch = {"w": jnp.ones((2, 3))}, {"w": Scale(jnp.ones((1, 3)))}
    >>> unfolded_report(lambda params: jnp.sin(params["w"]))(params, patch)
    ['w: sin']
    """

    def report(params: Params, patch: Patch, *args: Any, **kwargs: Any) -> list[str]:
        return leaves.materialised(fn)(_patched(params, patch), *args, **kwargs)

    return report


def _patched(params: Params, patch: Patch) -> Params:
    """Put a leaf with factors where the patch has them, and fold the rest."""
    check(params, patch)
    flat = tree.flatten(params)
    new: dict[str, Any] = {}
    for name, kind in patch.items():
        if isinstance(kind, Scale) and flat[name].ndim > 1:
            new[name] = leaves.Scaled(flat[name], kind.vector, name=name)
            for other, shape in kind.tied:
                new |= Scale(kind.vector.reshape(shape)).fold(other, flat)
        elif isinstance(kind, LowRank):
            new[name] = leaves.LowRank(flat[name], kind.a, kind.b, kind.scale, name=name)
        else:
            new |= kind.fold(name, flat)
    return tree.rebuild(params, {**flat, **new})
