"""Run a function on parameters that are not arrays.

A leaf is any registered pytree class with `shape`, `dtype`, `materialise() -> array` and
`meet(equation, values, variable) -> outputs | None`. The function is traced once with plain arrays
in the place of its leaves; the equations of that jaxpr are then carried out one by one, and an equation
that meets a leaf asks the leaf first. What has an inner jaxpr (jit, remat, scan, cond, while) is entered
with the leaf alive. Everything else, and every answer None, falls back to `materialise()`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from fishjax.types import Array

Path = tuple[int, ...]  # the equation's index in its jaxpr, after those of the equations around it
OnMaterialise = Callable[[Any, "Equation"], None]

CALLS = ("jit", "pjit", "closed_call", "core_call")  # entered by inlining


class Equation(NamedTuple):
    """One equation of a jaxpr, and where it stands."""

    eqn: JaxprEqn
    jaxpr: Jaxpr
    path: Path

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.eqn.params

    def operands(self, values: dict[Var, Any]) -> list[Any]:
        """Return what stands in each position, literals included."""
        return [v.val if isinstance(v, Literal) else values[v] for v in self.eqn.invars]

    def bind(self, values: dict[Var, Any]) -> list[Array]:
        """Carry the equation out on arrays."""
        alone = self.jaxpr.replace(
            constvars=[],
            invars=list(values),
            outvars=list(self.eqn.outvars),
            eqns=[self.eqn],
            effects=self.eqn.effects,
            debug_info=self.jaxpr.debug_info.with_unknown_names(),
        )
        return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())


def is_leaf(x: Any) -> bool:
    """Say whether `x` is a parameter that is not an array."""
    return hasattr(x, "materialise")


def array(x: Any) -> Array:
    """Return an array as it is, a leaf materialised."""
    return x.materialise() if is_leaf(x) else x


def carry_out(equation: Equation, values: dict[Var, Any], variable: Var, base: Any) -> list[Any] | None:
    """Carry an equation out on a leaf's base in the leaf's place; None where the base has to be formed."""
    values = {**values, variable: base}
    return base.meet(equation, values, variable) if is_leaf(base) else equation.bind(values)


def interpret(fn: Callable[..., Any], on_materialise: OnMaterialise | None = None) -> Callable[..., Any]:
    """Return `fn` made to accept leaves in the place of arrays, anywhere in its arguments.

    What is no array (a string, a bool, None) reaches `fn` as it is. Like a function under `jit`, `fn`
    sees tracers; the result works under jit, grad, vmap, scan and remat. Without leaves it is `fn`.

    Args:
      fn: any JAX function.
      on_materialise: called with a leaf and the equation whenever one had to be materialised.

    >>> import jax.numpy as jnp
    >>> from fishjax.leaves import Scaled, interpret
    >>> w = Scaled(jnp.ones((2, 3)), jnp.array([[1.0, 2.0, 3.0]]))
    >>> interpret(lambda params, x: x @ params["w"])({"w": w}, jnp.ones(2)).tolist()
    [2.0, 4.0, 6.0]
    """

    def run(*args, **kwargs):
        values = arrays_of((args, kwargs))
        if not any(map(is_leaf, values)):
            return fn(*args, **kwargs)
        traced = trace(fn, *args, **kwargs)
        outputs = evaluate(traced.jaxpr, traced.consts, values, on_materialise=on_materialise)
        return jax.tree.unflatten(jax.tree.structure(traced.out), _arrays(outputs))

    return run


class Traced(NamedTuple):
    """A function's equations for arguments of certain shapes."""

    jaxpr: Jaxpr  # its arguments are those of `arrays_of`
    consts: Sequence[Any]
    out: Any  # the shapes of the result, in its structure


def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Traced:
    """Trace a function with plain arrays in the place of leaves and of shapes."""
    flat, structure = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    places = [i for i, x in enumerate(flat) if _is_value(x)]

    def on_arrays(arrays):
        filled = dict(zip(places, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(structure, [filled.get(i, x) for i, x in enumerate(flat)])
        return fn(*args, **kwargs)

    values = [flat[i] for i in places]
    stand_in = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_leaf(x) else x for x in values]
    closed, out = jax.make_jaxpr(on_arrays, return_shape=True)(stand_in)
    return Traced(closed.jaxpr, closed.consts, out)


def arrays_of(arguments: Any) -> list[Any]:
    """Return the arrays and leaves among the arguments of a function, in order."""
    return [x for x in jax.tree.leaves(arguments, is_leaf=is_leaf) if _is_value(x)]


def _is_value(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    path: Path = (),
    on_materialise: OnMaterialise | None = None,
) -> list[Any]:
    """Return the outputs of a jaxpr whose arguments may be leaves; outputs may be leaves too."""
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    for equation in equations(jaxpr, path):
        values = {v: env[v] for v in equation.eqn.invars if not isinstance(v, Literal)}
        if not any(map(is_leaf, values.values())):
            outputs = equation.bind(values)
        elif equation.name in CALLS:
            outputs = _enter(inner_jaxpr(equation), equation.operands(values), equation.path, on_materialise)
        elif equation.name in _ENTER and enterable(equation):
            outputs = _ENTER[equation.name](equation, equation.operands(values), on_materialise)
        elif equation.name == "while":
            outputs = _enter_while(equation, equation.operands(values), on_materialise)
        else:
            outputs = _meet(equation, values, on_materialise)
        env.update(zip(equation.eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def equations(jaxpr: Jaxpr, path: Path = ()) -> Iterator[Equation]:
    """Yield the equations that an output or an effect depends on, in order."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    alive = []
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
            alive.append(Equation(eqn, jaxpr, (*path, i)))
    return reversed(alive)


def inner_jaxpr(equation: Equation) -> ClosedJaxpr:
    """Return the jaxpr of one of the `CALLS`."""
    return equation.params.get("jaxpr") or equation.params["call_jaxpr"]


def shape_of(variable: Var | Literal) -> tuple[int, ...]:
    """Return the shape of what a variable of a jaxpr stands for."""
    return getattr(variable.aval, "shape", ())


def enterable(equation: Equation) -> bool:
    """Say whether an equation's inner jaxprs are entered with leaves alive."""
    # A `cond` over platforms holds branches that do not compile on this one.
    return equation.name in _ENTER and equation.params.get("branches_platforms") is None


class ScanParts(NamedTuple):
    """How the operands and outputs of a `scan` divide."""

    consts: int  # the first operands: seen whole by every step
    carry: int  # the next: handed from step to step, and as many of the first outputs


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """Divide a scan by its shapes: what is stacked has one axis more outside than in the body."""
    inner = eqn.params["jaxpr"].jaxpr
    xs = sum(len(shape_of(v)) > len(shape_of(w)) for v, w in zip(eqn.invars, inner.invars, strict=True))
    ys = sum(len(shape_of(v)) > len(shape_of(w)) for v, w in zip(eqn.outvars, inner.outvars, strict=True))
    carry = len(eqn.outvars) - ys
    return ScanParts(len(eqn.invars) - xs - carry, carry)


def _meet(equation: Equation, values: dict[Var, Any], on_materialise: OnMaterialise | None) -> list[Any]:
    """Ask the first leaf; the others are materialised before, and itself where it has no rule."""

    def materialise(variable):
        if on_materialise:
            on_materialise(values[variable], equation)
        values[variable] = values[variable].materialise()

    first, *others = [v for v, x in values.items() if is_leaf(x)]
    for variable in others:
        materialise(variable)
    outputs = values[first].meet(equation, values, first)
    if outputs is None:
        materialise(first)
        outputs = equation.bind(values)
    return outputs


def _enter(closed: ClosedJaxpr, operands, path, on_materialise) -> list[Any]:
    return evaluate(closed.jaxpr, closed.consts, operands, path, on_materialise)


def _enter_remat(equation, operands, on_materialise):
    params = equation.params
    inner = params["jaxpr"]

    def body(*args):
        return _arrays(evaluate(inner, (), args, equation.path, on_materialise))

    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)


def _enter_cond(equation, operands, on_materialise):
    index, *rest = operands
    branches = [
        lambda *args, i=i, b=b: _arrays(_enter(b, args, (*equation.path, i), on_materialise))
        for i, b in enumerate(equation.params["branches"])
    ]
    return jax.lax.switch(index, branches, *rest)


def _enter_scan(equation, operands, on_materialise):
    params, parts = equation.params, scan_parts(equation.eqn)
    first_x = parts.consts + parts.carry
    # A leaf may have parts of its own to be scanned although itself it is a constant of the scan.
    kept = [_at_scan(x, equation.path) for x in operands[: parts.consts]]
    carry = _arrays(operands[parts.consts : first_x])
    xs = [x.stacked(params["length"]) if hasattr(x, "stacked") else x for x in operands[first_x:]]

    def body(carry, scanned):
        xs, own = scanned
        consts = [x.with_scanned(o) if is_leaf(x) and o is not None else x for (x, _), o in zip(kept, own)]
        outputs = _arrays(_enter(params["jaxpr"], [*consts, *carry, *xs], equation.path, on_materialise))
        return outputs[: parts.carry], outputs[parts.carry :]

    carry, ys = jax.lax.scan(
        body,
        carry,
        (xs, [own for _, own in kept]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _enter_while(equation, operands, on_materialise):
    """Enter a loop with its constants alive; what it carries is formed."""
    test, step = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    of_step = len(step.jaxpr.invars) - len(equation.eqn.outvars)
    first = len(operands) - len(step.jaxpr.invars)
    test_consts, step_consts = operands[:first], operands[first : first + of_step]

    def more(carry):
        return _arrays(_enter(test, [*test_consts, *carry], (*equation.path, 0), on_materialise))[0]

    def advance(carry):
        return _arrays(_enter(step, [*step_consts, *carry], (*equation.path, 1), on_materialise))

    return jax.lax.while_loop(more, advance, _arrays(operands[first + of_step :]))


def _at_scan(x: Any, path: Path) -> tuple[Any, Any]:
    return x.split_at_scan(path) if hasattr(x, "split_at_scan") else (x, None)


def _arrays(values: Sequence[Any]) -> list[Array]:
    return [array(x) for x in values]


_ENTER = {
    "checkpoint": _enter_remat,
    "remat2": _enter_remat,
    "remat": _enter_remat,
    "cond": _enter_cond,
    "scan": _enter_scan,
}
