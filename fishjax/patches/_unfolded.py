"""Run a function on patched parameters without ever forming the patched weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fishjax import leaves, tree
from fishjax.errors import StructureError
from fishjax.patches._apply import check, touched
from fishjax.patches._stack import Selected, adapter
from fishjax.types import Array, Params, Patch


def unfolded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `g` with `g(params, patch, *args) == fn(patches.apply(params, patch), *args)`.

    Where a weight with a `Scale` or `LowRank` patch is used in a matmul or a row lookup, the activations
    are scaled or take the thin detour instead, so no gradient of the weight's size is formed when the
    patch is trained. Where it is used in a way without such a rule, the weight is folded there: right
    everywhere, and `unfolded_report` tells. Vectors (biases) and the other kinds are folded.

    The patch may be a sequence of patches, which mean what `compose` makes of them; or what `select`
    gives: then `g` maps `fn` over the leading axis of every argument and result, each example with a
    batch axis of 1 and under its own patch, and the weights stay as they are. Arguments without an axis
    are shared, and so must be results without one.

    Args:
      fn: any JAX function whose first argument is the parameters. Like a function under `jit`, it sees
        tracers.

    Raises:
      StructureError: the patch names a leaf that is not there, or does not fit it; or, with one patch for
        each example, an argument or a result has not the batch as its leading axis.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Scale
    >>> params, patch = {"w": jnp.ones((2, 3))}, {"w": Scale(jnp.array([[1.0, 2.0, 3.0]]))}
    >>> unfolded(lambda params, x: x @ params["w"])(params, patch, jnp.ones(2)).tolist()
    [2.0, 4.0, 6.0]

    References: Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    def g(params: Params, patch: Patch | Sequence[Patch] | Selected, *args: Any, **kwargs: Any) -> Any:
        return _run(fn, None, params, patch, args, kwargs)

    return g


def unfolded_report(fn: Callable[..., Any]) -> Callable[..., list[str]]:
    """Return a function of the arguments of `unfolded(fn)` that lists which weights it folds, and for what.

    >>> import jax.numpy as jnp
    >>> from fishjax.patches import Scale
    >>> params, patch = {"w": jnp.ones((2, 3))}, {"w": Scale(jnp.ones((1, 3)))}
    >>> unfolded_report(lambda params: jnp.sin(params["w"]))(params, patch)
    ['w: sin']
    """

    def report(
        params: Params, patch: Patch | Sequence[Patch] | Selected, *args: Any, **kwargs: Any
    ) -> list[str]:
        return leaves.noted(lambda note: _run(fn, note, params, patch, args, kwargs))

    return report


def unfold(params: Params, patch: Patch | Sequence[Patch]) -> Params:
    """Return the parameters with leaves that hold factors where a patch, or a sequence of them, has such."""
    flat = tree.flatten(params)
    for part in [patch] if isinstance(patch, Mapping) else patch:
        check(params, part)
        for name, kind in part.items():
            mine = {n: flat[n] for n in touched({name: kind})}
            if hasattr(kind, "unfold"):
                flat |= kind.unfold(name, mine)
            else:
                flat |= kind.fold(name, {n: leaves.array(x) for n, x in mine.items()})
    return tree.rebuild(params, flat)


def _run(fn, note, params: Params, patch: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(patch, Selected):
        return _each(fn, note, params, patch, args, kwargs)
    return leaves.interpret(fn, note)(unfold(params, patch), *args, **kwargs)


def _each(fn, note, params: Params, selected: Selected, args: Any, kwargs: Any) -> Any:
    """Trace `fn` for one example, and carry its equations out under `vmap` for all of them."""
    flat, structure = jax.tree.flatten((args, kwargs), is_leaf=leaves.is_leaf)
    ids = selected.task_ids
    mapped = {i: x for i, x in enumerate(flat) if _is_mapped(x)}
    for x in mapped.values():
        if x.shape[0] != ids.shape[0]:
            raise StructureError(
                f"every argument must have one entry for each of the {ids.shape[0]} task ids on its leading "
                f"axis; got {tree.describe(x)}"
            )

    flat_params = tree.flatten(params)
    for part in jax.eval_shape(lambda task_id: adapter(selected.stacked, task_id, flat_params), ids[0]):
        check(params, part)

    def filled(rows: Mapping[int, Any]) -> Any:
        return jax.tree.unflatten(structure, [rows.get(i, x) for i, x in enumerate(flat)])

    one, options = filled({i: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for i, x in mapped.items()})
    traced = leaves.trace(fn, params, *one, **options)
    shapes = jax.tree.leaves(traced.out)
    if odd := [y for y in shapes if y.shape and y.shape[0] != 1]:
        raise StructureError(
            "with one patch for each example every result must have the batch as its leading axis; got "
            f"{tree.describe(odd[0])} from one example"
        )

    def example(task_id: Array, rows: dict[int, Array]) -> list[Array]:
        patched = unfold(params, adapter(selected.stacked, task_id, flat_params))
        args, kwargs = filled({i: x[None] for i, x in rows.items()})
        values = leaves.arrays_of(((patched, *args), kwargs))
        outputs = leaves.evaluate(traced.jaxpr, traced.consts, values, on_materialise=note)
        return [y[0] if s.shape else y for y, s in zip(map(leaves.array, outputs), shapes, strict=True)]

    axes = [0 if y.shape else None for y in shapes]
    try:
        outputs = jax.vmap(example, out_axes=axes)(ids, mapped)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise StructureError(
            "with one patch for each example a result without axes must be the same for all; give losses and "
            "the like the batch as their leading axis"
        ) from None
    return jax.tree.unflatten(jax.tree.structure(traced.out), outputs)


def _is_mapped(x: Any) -> bool:
    return not leaves.is_leaf(x) and len(getattr(x, "shape", ())) > 0
