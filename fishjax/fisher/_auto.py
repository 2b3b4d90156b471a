"""Which method, and how many examples at a time: from the shapes, the device and the memory."""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from fishjax import tree
from fishjax.fisher import _one_pass
from fishjax.fisher._one_pass import Way
from fishjax.fisher._scores import Scores, of_loss
from fishjax.leaves import shape_of
from fishjax.types import Example, LossFn, Params

# Bytes of activations (as `activation_bytes` counts) at which a CPU is fastest: 32 times the parameters,
# within bounds. Fewer pass the parameters too often, more leave the caches. Measured: 16 examples of a
# MiniLM, 4 of a BERT-base, of 128 tokens; 16 of 32 tokens where the parameters have 0.2 MB (1024 at a time
# take 2.3 times as long).
PER_PARAMETER = 32
LEAST, BEST = 2**24, {"cpu": 2**31}
# On a CPU batched per-example gradients are the slowest way of all once they leave the caches.
BEST_REFERENCE = {"cpu": 2**22}
FRACTION = 0.25  # of an accelerator's memory
MOST = 1024


class Choice(NamedTuple):
    """What will be done."""

    method: str  # "one_pass" | "reference"
    chunk_size: int  # examples at a time
    ways: list[Way]  # by leaf; empty for the reference method


def choose(
    scores: Scores, params: Params, example: Example, method: str, chunk_size: int | None, memory: int | None
) -> Choice:
    """Choose a method, unless one is asked for, and the size of a micro-batch, unless that is.

    Args:
      example: one example's shapes.
      memory: bytes that one micro-batch may take beside parameters and result; None for what is best.
    """
    closed, ways = _one_pass.plan(scores.output, params, example)
    if method == "auto":
        odd = sum(math.prod(w.shape) for w in ways if w.how == "reference")
        method = "reference" if 2 * odd > sum(math.prod(w.shape) for w in ways) else "one_pass"
    if chunk_size is None:
        each = activation_bytes(closed.jaxpr)
        if method == "reference":
            each += 2 * sum(x.size * tree.wide_dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
        else:
            rows = scores.rows(shape_of(closed.jaxpr.outvars[0]))
            each *= min(rows, _one_pass.MOST_ROWS_AT_ONCE)  # each has cotangents of its own
            each += sum(math.prod(w.shape) * 4 for w in ways if w.how == "copies")
        fit = max(1, (memory or _budget(method, params)) // each)
        chunk_size = min(MOST, 2 ** (fit.bit_length() - 1))  # a power of two divides most batches
    return Choice(method, chunk_size, ways if method == "one_pass" else [])


def explain(loss_fn: LossFn, params: Params, example: Example) -> str:
    """Say, leaf by leaf, how `method="auto"` computes the Fisher and why.

    "in place": every entry is used once, its squares are summed where it is used. "copies": copied for
    each example of a micro-batch. "hub": large and used several times; the uses are put together before
    they are squared. "reference": one gradient an example, for this leaf alone.

    Args:
      example: one example, without a batch axis.

    >>> import jax.numpy as jnp
    >>> from fishjax import fisher
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    >>> print(fisher.explain(lambda p, x: jnp.sum((x @ p["w"] + p["b"]) ** 2), params, jnp.ones(2)))
    leaf  shape   way       because
    b     [3]     in place  add
    w     [2, 3]  in place  dot_general
    9 parameters: 100.0 % in place. one_pass, 1024 examples at a time.
    """
    scores = of_loss(loss_fn)
    choice = choose(scores, params, example, "auto", None, None)
    ways = choice.ways or _one_pass.plan(scores.output, params, example)[1]
    rows = [("leaf", "shape", "way", "because"), *((w.name, str(list(w.shape)), w.how, w.why) for w in ways)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(c.ljust(n) for c, n in zip(row, widths)), row[3]]) for row in rows]
    total = max(1, sum(math.prod(w.shape) for w in ways))
    shares = {w.how: sum(math.prod(v.shape) for v in ways if v.how == w.how) / total for w in ways}
    said = ", ".join(f"{100 * share:.1f} % {how}" for how, share in shares.items())
    return "\n".join(
        [*lines, f"{total} parameters: {said}. {choice.method}, {choice.chunk_size} examples at a time."]
    )


def activation_bytes(jaxpr: Jaxpr) -> int:
    """Return about how many bytes of one example the backward pass keeps: all that is computed, once."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [activation_bytes(getattr(j, "jaxpr", j)) for j in jaxprs_in_params(eqn.params)]
        if inner:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        else:
            total += sum(math.prod(shape_of(v)) * _itemsize(v) for v in eqn.outvars)
    return max(1, total)


def _itemsize(variable: Any) -> int:
    return getattr(getattr(variable.aval, "dtype", None), "itemsize", 4)


def _budget(method: str, params: Params) -> int:
    backend = jax.default_backend()
    if method == "reference" and backend in BEST_REFERENCE:
        return BEST_REFERENCE[backend]
    if backend in BEST:
        wanted = PER_PARAMETER * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return min(BEST[backend], max(LEAST, wanted))
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(FRACTION * stats.get("bytes_limit", 2**34))
