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
# Rows of cotangents (classes, draws) that go backward together: they share every weight and every saved
# activation that is read.
MOST_ROWS_AT_ONCE = 4


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


def add_squares(
    scores: Scores, params: Params, total: Fisher, batch: Batch, keys: Array | None, counts: Array
) -> Fisher:
    """Return `total + sum_i sum_k (J_i^T s_ik)^2` over one micro-batch: as `_reference.add_squares`."""
    size = counts.shape[0]
    flat, before = tree.flatten(params), tree.flatten(total)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    closed, ways = plan(scores.output, params, example)
    tapped = [w.name for w in ways if w.how in ("in place", "copies")]
    channels = {w.name: {u.equation.path: _channel(u, size) for u in w.uses} for w in ways if w.how == "hub"}
    rows = jax.eval_shape(scores.output, params, example).shape
    groups, each = split(scores.rows(rows), MOST_ROWS_AT_ONCE)
    # Squares that arise at one place are added to the total there: one buffer less, and one pass over it.
    started = {w.name for w in ways if groups == 1 and w.name in tapped and _is_whole(w)}
    sinks = {n: before[n] if n in started else jnp.zeros_like(before[n]) for n in tapped}

    def outputs(sinks, reached, channels):
        def one(example, channels, number):
            leaves = [_leaf(way, flat[way.name], sinks, reached, channels, number) for way in ways]
            (out,) = evaluate(closed.jaxpr, closed.consts, [*leaves, *jax.tree.leaves(example)])
            return out.materialise() if hasattr(out, "materialise") else out

        return jax.vmap(one)(batch, channels, jnp.zeros(size))

    out, pull = jax.vjp(outputs, sinks, dict.fromkeys(tapped, jnp.zeros(())), channels)

    def row(k, counts):
        s = jax.vmap(lambda *args: scores.row(*args, k))(out, batch, keys)
        s = jnp.where(counts.reshape(-1, *[1] * (s.ndim - 1)), s, 0).astype(out.dtype)
        found, reached, handed = pull(s)
        for way in ways:
            if way.how == "hub":
                found[way.name] = _of_hub(flat[way.name], way.uses, handed[way.name])
        return jax.tree.map(_squares.sum_rows, (found, reached))

    def group(total, start):
        if each == 1:
            found, reached = row(start, counts)
        else:
            k = start + jnp.arange(each)
            real = counts[None] & (k < scores.rows(rows))[:, None]
            found, reached = jax.vmap(row, out_axes=None)(k, real)
        return {
            n: jnp.where(reached[n] > 0, 0, total[n]) + f if n in started else total[n] + f
            for n, f in found.items()
        }

    into = {w.name: before[w.name] for w in ways if w.how != "reference"}
    if groups == 1:
        into = group(into, 0)
    else:  # scanned, not unrolled
        into = jax.lax.scan(lambda t, k: (group(t, k), None), into, each * jnp.arange(groups))[0]
    rest = {w.name: flat[w.name] for w in ways if w.how == "reference"}
    if rest:
        into |= _one_by_one(scores, params, rest, before, batch, keys, counts)
    return tree.rebuild(params, into)


def _is_whole(way: Way) -> bool:
    """Whether a leaf's squares arise at one place, all of them, in no scan."""
    if way.how == "copies":
        return True
    whole = tuple((0, n) for n in way.shape)
    return len(way.uses) == 1 and way.uses[0].box == whole and not way.uses[0].lengths


def _leaf(way: Way, weight: Array, sinks, reached, channels, number) -> Any:
    if way.how == "hub":
        return Hub(weight, channels[way.name])
    if way.how == "reference":
        return weight
    tap = Tap(weight, sinks[way.name], reached[way.name], number)
    return tap.materialise() if way.how == "copies" else tap


def _channel(use: Use, size: int) -> Any:
    """Zeros like what a use hands out: its other operands (rows' numbers as floats) and its cotangents."""

    def zeros(v: Any):
        dtype = v.aval.dtype if jnp.issubdtype(v.aval.dtype, jnp.inexact) else jnp.float32
        return jnp.zeros((size, *use.lengths, *shape_of(v)), dtype)

    return tuple(map(zeros, _others(use))), tuple(map(zeros, use.equation.eqn.outvars))


def _of_hub(w: Array, uses: list[Use], handed: Any) -> Array:
    """Return the sum over examples of the square of the sum over uses."""
    zero = jnp.zeros(w.shape, tree.wide_dtype(w.dtype))
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
            return _squares.add_row_squares(zero, jnp.concatenate(ids, 1), jnp.concatenate(g, 1))

    def gradient_squared(handed):
        def outputs(w):
            return [_replay(u, w, handed[u.equation.path][0]) for u in uses]

        _, pull = jax.vjp(outputs, w)
        return _squares.square(pull([handed[u.equation.path][1] for u in uses])[0])

    return _squares.add_over_examples(gradient_squared, (0,), size, w.size)(zero, handed)


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


def _one_by_one(scores, params, rest, total, batch, keys, counts) -> dict[str, Array]:
    """Add the squares of a few leaves the reference way, one example at a time."""
    flat = tree.flatten(params)
    part = scores._replace(output=lambda rest, x: scores.output(tree.rebuild(params, {**flat, **rest}), x))

    def step(total, one):
        return _reference.add_squares(part, rest, total, *jax.tree.map(lambda x: x[None], one)), None

    return jax.lax.scan(step, {n: total[n] for n in rest}, (batch, keys, counts))[0]


def split(count: int, most: int) -> tuple[int, int]:
    """Return how many parts of at most `most`, all of one size, hold `count`; and that size."""
    parts = -(-count // most)
    return parts, -(-count // parts)
