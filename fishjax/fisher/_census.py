"""Where and how a function uses each of its parameters: found by walking its jaxpr, not by tracing calls.

Squares of a parameter's gradient may be summed use by use only if each of its entries is used once in an
example (else the cross terms would be lost). The walk over-counts where it is not sure: a constant of a
scan is many uses, two slices overlap unless they are seen to be apart.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var

from fishjax.leaves import (
    CALLS,
    Equation,
    Path,
    enterable,
    equations,
    inner_jaxpr,
    is_row_take,
    regroup,
    scan_parts,
    shape_of,
)

Box = tuple[tuple[int, int], ...]  # [start, stop) on each axis of the parameter


class Use(NamedTuple):
    """One place where a parameter, or a part of it, meets something else."""

    leaf: int
    box: Box  # which entries, at most
    how: str  # a primitive's name, "rows" (a lookup of whole rows), or what it is handed to
    equation: Any  # an `Equation`; None where it is handed on as it is
    variable: Any  # the `Var` that stands for it in that equation
    chain: Any  # equations (casts, transposes, ...) before; None once a scan has cut it up
    lengths: tuple[int, ...]  # of the scans around it
    repeated: bool  # whether every step of a scan uses the same entries


class _Piece(NamedTuple):
    """What a variable of the jaxpr holds of a parameter."""

    leaf: int
    box: Box
    axes: tuple[int | None, ...]  # the parameter's axis that each axis is, where that is known
    chain: Any
    repeated: bool


def census(jaxpr: Jaxpr, num_leaves: int) -> list[list[Use]]:
    """Return the uses of each of the first `num_leaves` arguments of a jaxpr."""
    pieces = []
    for i, variable in enumerate(jaxpr.invars):
        shape = shape_of(variable)
        box = tuple((0, n) for n in shape)
        pieces.append(_Piece(i, box, tuple(range(len(shape))), (), False) if i < num_leaves else None)
    uses: list[list[Use]] = [[] for _ in range(num_leaves)]
    for piece in _walk(jaxpr, pieces, (), (), uses):
        _hand_on(piece, "output", (), uses)
    return uses


def is_single(uses: Sequence[Use]) -> bool:
    """Say whether no entry of the parameter is used twice in one example."""
    if any(u.repeated for u in uses):
        return False
    return not any(_overlap(a.box, b.box) for i, a in enumerate(uses) for b in uses[:i])


def is_structural(equation: Equation) -> bool:
    """Say whether an equation only moves or casts the entries of its operand, each to one place."""
    if equation.name == "reshape":
        return equation.params["dimensions"] is None
    if equation.name == "convert_element_type":
        return jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
    return equation.name in ("transpose", "squeeze", "slice", "split", "copy", "sharding_constraint")


def has_gradient(equation: Equation) -> bool:
    """Say whether any output of an equation can carry a gradient."""
    return any(jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.inexact) for v in equation.eqn.outvars)


def _walk(jaxpr: Jaxpr, pieces, path: Path, lengths, uses) -> list[_Piece | None]:
    env: dict[Var, _Piece] = {v: p for v, p in zip(jaxpr.invars, pieces, strict=True) if p is not None}
    for equation in equations(jaxpr, path):
        operands = [None if isinstance(v, Literal) else env.get(v) for v in equation.eqn.invars]
        if not any(operands):
            continue
        if equation.name in CALLS:
            out = _walk(inner_jaxpr(equation).jaxpr, operands, equation.path, lengths, uses)
        elif enterable(equation):
            out = _enter(equation, operands, lengths, uses)
        elif is_structural(equation):
            out = _move(equation, operands[0])
        else:
            out = [None] * len(equation.eqn.outvars)
            # A loop is entered with its constants alive, even where it gives only integers.
            if has_gradient(equation) or equation.name == "while":
                _meet(equation, operands, lengths, uses)
        env |= {v: p for v, p in zip(equation.eqn.outvars, out, strict=True) if p is not None}
    return [None if isinstance(v, Literal) else env.get(v) for v in jaxpr.outvars]


def _meet(equation, operands, lengths, uses):
    """The first parameter of an equation is used there; others are copied for each example before."""
    pieces = {v: p for v, p in zip(equation.eqn.invars, operands, strict=True) if p is not None}
    (variable, first), *others = pieces.items()
    rows = is_row_take(equation) and equation.eqn.invars[0] is variable
    _add(uses, first, "rows" if rows else equation.name, equation, variable, lengths)
    for _, piece in others:
        _hand_on(piece, f"{equation.name} with another parameter", lengths, uses)


def _hand_on(piece, how, lengths, uses):
    if piece is not None:
        _add(uses, piece, how, None, None, lengths)


def _add(uses, piece, how, equation, variable, lengths):
    use = Use(piece.leaf, piece.box, how, equation, variable, piece.chain, lengths, piece.repeated)
    uses[piece.leaf].append(use)


def _enter(equation, operands, lengths, uses):
    """Walk the inner jaxprs of a remat, a cond or a scan; what they return is handed on."""
    params, path = equation.params, equation.path
    if equation.name == "cond":
        bodies = [(b.jaxpr, (*path, i)) for i, b in enumerate(params["branches"])]
        operands = operands[1:]
    elif equation.name == "scan":
        parts, length = scan_parts(equation.eqn), params["length"]
        first_x = parts.consts + parts.carry
        for piece in operands[parts.consts : first_x]:
            _hand_on(piece, "carry of a scan", lengths, uses)
        lengths = (*lengths, length)
        operands = [
            *(p and p._replace(repeated=p.repeated or length != 1) for p in operands[: parts.consts]),
            *[None] * parts.carry,
            *(p and p._replace(axes=p.axes[1:], chain=None) for p in operands[first_x:]),
        ]
        bodies = [(params["jaxpr"].jaxpr, path)]
    else:
        bodies = [(params["jaxpr"], path)]
    for body, inner_path in bodies:
        for piece in _walk(body, operands, inner_path, lengths, uses):
            _hand_on(piece, f"output of a {equation.name}", lengths, uses)
    return [None] * len(equation.eqn.outvars)


def _move(equation: Equation, piece: Any) -> list[_Piece | None]:
    """Follow a piece through a structural equation."""
    params, axes = equation.params, piece.axes
    chain = None if piece.chain is None else (*piece.chain, equation)
    if equation.name == "split":
        if piece.chain is not None and len(params["sizes"]) > 1:
            chain = None  # a chain is of equations with one output
        stops = [sum(params["sizes"][: i + 1]) for i in range(len(params["sizes"]))]
        return [
            _narrow(piece, {params["axis"]: (stop - n, stop, 1)})._replace(chain=chain)
            for stop, n in zip(stops, params["sizes"])
        ]
    if equation.name == "slice":
        strides = params["strides"] or (1,) * len(axes)
        ranges = zip(params["start_indices"], params["limit_indices"], strides)
        return [_narrow(piece, dict(enumerate(ranges)))._replace(chain=chain)]
    if equation.name == "transpose":
        axes = tuple(axes[d] for d in params["permutation"])
    elif equation.name == "squeeze":
        gone = {d % len(axes) for d in params["dimensions"]}
        axes = tuple(a for d, a in enumerate(axes) if d not in gone)
    elif equation.name == "reshape":
        axes = _reshaped(axes, shape_of(equation.eqn.invars[0]), tuple(params["new_sizes"]))
    return [piece._replace(axes=axes, chain=chain)]


def _narrow(piece: _Piece, ranges) -> _Piece:
    box, axes = list(piece.box), list(piece.axes)
    for d, (start, stop, step) in ranges.items():
        if (axis := axes[d]) is not None:
            low = box[axis][0]
            box[axis] = (low + start, low + stop)
            if step != 1:
                axes[d] = None
    return piece._replace(box=tuple(box), axes=tuple(axes))


def _reshaped(axes, old, new):
    """An axis that a reshape keeps whole stays known; what it merges or splits does not."""
    result: list[int | None] = [None] * len(new)
    if 0 in old:
        return tuple(result)
    for before, after in regroup(old, new):
        mine, theirs = [d for d in before if old[d] != 1], [d for d in after if new[d] != 1]
        if len(mine) == len(theirs) == 1:
            result[theirs[0]] = axes[mine[0]]
    return tuple(result)


def _overlap(a: Box, b: Box) -> bool:
    return all(
        start < other_stop and other_start < stop for (start, stop), (other_start, other_stop) in zip(a, b)
    )
