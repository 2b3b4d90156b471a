"""The diagonal Fisher in one backward pass over a micro-batch, parameter by parameter.

The function's jaxpr for one example is run under `vmap` over the micro-batch, with its parameters
replaced by leaves that square each example's gradient where it arises, so that no gradient of one
example outlives its square. What the census does not understand goes the reference way, by itself.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from fishjax import tree
from fishjax.fisher import _census, _reference, _squares
from fishjax.fisher._census import Use
from fishjax.fisher._scores import Scores
from fishjax.fisher._taps import Hub, Tap
from fishjax.leaves import evaluate, shape_of
from fishjax.types import Array, Batch, Example, Fisher, Params

# Up to this many numbers, a parameter in a use without a rule of its own is copied for each example of
# the micro-batch; beyond, it goes the reference way.
MOST_COPIED = 2**22
# Below this many, copies are cheaper than collecting what the uses of a shared parameter hand out.
FEW = 2**14

BILINEAR = ("dot_general", "conv_general_dilated", "rows")
MOST_ROWS = 2**24  # a row's number must be exact in float32


class Way(NamedTuple):
    """How one parameter's squares are computed, and why."""

    name: str  # the leaf
    shape: tuple[int, ...]
    how: str  # "in place" | "copies" | "hub" | "reference"
    why: str
    uses: list[Use]


def plan(output: Any, params: Params, example: Example) -> tuple[Any, list[Way]]:
    """Trace `output` for one example and choose a way for each leaf, in the order of `jax.tree.leaves`.

    Returns:
      The closed jaxpr of `(params, example) -> output`, and the ways.
    """
    closed = jax.make_jaxpr(output)(params, example)
    flat = tree.flatten(params)
    uses = _census.census(closed.jaxpr, len(flat))
    return closed, [_choose(name, leaf, u) for (name, leaf), u in zip(flat.items(), uses, strict=True)]


def _choose(name: str, leaf: Array, uses: list[Use]) -> Way:
    size = math.prod(leaf.shape)
    if not uses:
        return Way(name, leaf.shape, "in place", "not used", uses)
    said = ", ".join(dict.fromkeys(_say(u) for u in uses))
    if any(u.how.startswith("while") for u in uses):
        return Way(name, leaf.shape, "reference", f"in a while loop ({said})", uses)
    if _census.is_single(uses):
        if size > MOST_COPIED and any(u.how not in BILINEAR for u in uses):
            return Way(name, leaf.shape, "reference", f"no rule for {said} of a leaf this large", uses)
        return Way(name, leaf.shape, "in place", said, uses)
    if size > FEW and leaf.shape[0] < MOST_ROWS and all(map(_is_collected, uses)):
        return Way(name, leaf.shape, "hub", f"shared: {said}", uses)
    if size <= MOST_COPIED:
        return Way(name, leaf.shape, "copies", f"shared: {said}", uses)
    return Way(name, leaf.shape, "reference", f"shared: {said}", uses)


def _is_collected(use: Use) -> bool:
    return use.how in BILINEAR and use.equation is not None and use.chain is not None


def _say(use: Use) -> str:
    where = f" in a scan of {math.prod(use.lengths)}" if use.lengths else ""
    return f"{use.how}{where}{' (constant)' if use.repeated else ''}"


def squares(scores: Scores, params: Params, batch: Batch, keys: Array | None, counts: Array) -> Fisher:
    """Return sum_i sum_k (J_i^T s_ik)^2 over one micro-batch, like `params`: as `_reference.squares`."""
    size = counts.shape[0]
    flat = tree.flatten(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    closed, ways = plan(scores.output, params, example)
    sinks = {
        w.name: jnp.zeros(flat[w.name].shape, tree.wide_dtype(flat[w.name].dtype))
        for w in ways
        if w.how in ("in place", "copies")
    }
    channels = {w.name: {u.equation.path: _channel(u, size) for u in w.uses} for w in ways if w.how == "hub"}

    def outputs(sinks, channels):
        def one(example, channels, number):
            leaves = [_leaf(way, flat[way.name], sinks, channels, number) for way in ways]
            (out,) = evaluate(closed.jaxpr, closed.consts, [*leaves, *jax.tree.leaves(example)])
            return out.materialise() if hasattr(out, "materialise") else out

        return jax.vmap(one)(batch, channels, jnp.zeros(size))

    out, pull = jax.vjp(outputs, sinks, channels)

    def row(k):
        s = jax.vmap(lambda *args: scores.row(*args, k))(out, batch, keys)
        s = jnp.where(counts.reshape(-1, *[1] * (s.ndim - 1)), s, 0).astype(out.dtype)
        found, handed = pull(s)
        for way in ways:
            if way.how == "hub":
                found[way.name] = _of_hub(flat[way.name], way.uses, handed[way.name])
        return found

    total = _reference.sum_rows(row, scores.rows(out.shape[1:]))
    rest = {w.name: flat[w.name] for w in ways if w.how == "reference"}
    if rest:
        total |= _one_by_one(scores, params, rest, batch, keys, counts)
    return tree.rebuild(params, total)


def _leaf(way: Way, weight: Array, sinks, channels, number) -> Any:
    if way.how == "in place":
        return Tap(weight, sinks[way.name], number)
    if way.how == "copies":
        return Tap(weight, sinks[way.name], number).materialise()
    if way.how == "hub":
        return Hub(weight, channels[way.name])
    return weight


def _channel(use: Use, size: int) -> Any:
    """Zeros like what a use hands out: its other operands (rows' numbers as floats) and its cotangents."""

    def zeros(v: Any):
        dtype = v.aval.dtype if jnp.issubdtype(v.aval.dtype, jnp.inexact) else jnp.float32
        return jnp.zeros((size, *use.lengths, *shape_of(v)), dtype)

    return tuple(map(zeros, _others(use))), tuple(map(zeros, use.equation.eqn.outvars))


def _of_hub(w: Array, uses: list[Use], handed: Any) -> Array:
    """Return the sum over examples of the square of the sum over uses."""
    size = jax.tree.leaves(handed)[0].shape[0]
    handed = {
        u.equation.path: (
            [x.astype(v.aval.dtype) for x, v in zip(handed[u.equation.path][0], _others(u), strict=True)],
            list(handed[u.equation.path][1]),
        )
        for u in uses
    }
    if all(u.how == "rows" and not u.chain for u in uses):
        ids, g = [], []
        for u in uses:
            (index,), (rows,) = handed[u.equation.path]
            ids.append(index.reshape(size, -1).astype(jnp.int32))
            g.append(rows.reshape(size, ids[-1].shape[1], -1))
        if _squares.rows_pay(sum(x.shape[1] for x in ids), w.shape[0]):
            return _squares.row_squares(
                w.shape, tree.wide_dtype(w.dtype), jnp.concatenate(ids, 1), jnp.concatenate(g, 1)
            )

    def gradient_squared(handed):
        def outputs(w):
            return [_replay(u, w, handed[u.equation.path][0]) for u in uses]

        _, pull = jax.vjp(outputs, w)
        return _squares.square(pull([handed[u.equation.path][1] for u in uses])[0])

    return _squares.sum_over_examples(gradient_squared, (0,), size, w.size)(handed)


def _replay(use: Use, w: Array, xs: list[Array]) -> list[Array]:
    """Carry a use out again, for all steps of the scans around it at once; only its gradient is wanted."""
    for equation in use.chain:
        (variable,) = {v for v in equation.eqn.invars if not isinstance(v, Literal)}
        (w,) = equation.bind({variable: w})

    def op(w, *xs):
        return use.equation.bind({use.variable: w, **dict(zip(_others(use), xs, strict=True))})

    for _ in use.lengths:
        op = jax.vmap(op, (None, *[0] * len(xs)))
    return op(w, *xs)


def _others(use: Use) -> list[Any]:
    """The other variables of a use's equation."""
    found = dict.fromkeys(v for v in use.equation.eqn.invars if not isinstance(v, Literal))
    return [v for v in found if v is not use.variable]


def _one_by_one(scores, params, rest, batch, keys, counts) -> dict[str, Array]:
    """Return the squares of a few leaves the reference way, one example at a time."""
    flat = tree.flatten(params)
    part = scores._replace(output=lambda rest, x: scores.output(tree.rebuild(params, {**flat, **rest}), x))

    def step(total, one):
        more = _reference.squares(part, rest, *jax.tree.map(lambda x: x[None], one))
        return jax.tree.map(jnp.add, total, more), None

    zero = {n: jnp.zeros(w.shape, tree.wide_dtype(w.dtype)) for n, w in rest.items()}
    return jax.lax.scan(step, zero, (batch, keys, counts))[0]
