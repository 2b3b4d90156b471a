"""A model cut into stages: pure functions, each of which needs only its own part of the parameters."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax

from fishjax import leaves, tree
from fishjax.errors import UsageError
from fishjax.models._model import Model, subtree
from fishjax.types import Batch, Params


class Stage(NamedTuple):
    """Some consecutive blocks of a model, the first with what embeds, the last with the head.

    Fields:
      run: `run(params, carry) -> carry`; the first stage takes a batch, the last returns logits.
      names: the leaves that it needs; `params` holds these, nested as in the whole model.
      blocks: their names.
      moves: for each array of the carry that leaves it, whether blocks change it (activations); the others
        (masks, positions) stay what the first stage made.
    """

    run: Callable[[Params, Any], Any]
    names: tuple[str, ...]
    blocks: tuple[str, ...]
    moves: tuple[bool, ...] = ()


class Part(NamedTuple):
    """What embeds, one block or the head, seen by tracing."""

    run: Callable[[Params, Any], Any]
    names: tuple[str, ...]
    kept: tuple[bool, ...]  # for each array that comes out: it is the one that went in
    shape: str  # the program, without the names of its parameters: equal blocks have equal ones


def stages(model: Model, params: Params, batch: Batch, sizes: Sequence[int]) -> tuple[Stage, ...]:
    """Cut a model into stages of so many blocks each.

    Args:
      params: the whole model, or its shapes.
      batch: one that the model takes, or its shapes; it tells what embeds and what the head needs.
      sizes: blocks of each stage, at least 1, in order; their sum is `len(model.blocks)`.

    Raises:
      UsageError: the sizes do not fit, or the model has no split into blocks.

    >>> from fishjax import models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 6}
    >>> model = models.build(config | {"n_layer": 3})
    >>> params, batch = model.init(jax.random.key(0)), {"input_ids": jax.numpy.array([[3, 1, 4]])}
    >>> first, last = stages(model, params, batch, [2, 1])
    >>> first.blocks, "transformer.wpe.weight" in first.names, "transformer.wpe.weight" in last.names
    (('transformer.h.0', 'transformer.h.1'), True, False)
    """
    sizes = list(sizes)
    if not sizes or any(type(n) is not int or n < 1 for n in sizes) or sum(sizes) != len(model.blocks):
        raise UsageError(
            f"`sizes` must be whole numbers, at least 1, that add up to the model's {len(model.blocks)} "
            f"blocks; got {sizes}, in sum {sum(sizes)}"
        )
    embed, *blocks, head = parts(model, params, batch)
    moves = moving(blocks)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    found = []
    for i, (start, stop) in enumerate(pairwise(ends)):
        own = [*([embed] if i == 0 else []), *blocks[start:stop], *([head] if stop == len(blocks) else [])]
        names = tuple(sorted({n for part in own for n in part.names}))
        run = _chain([part.run for part in own])
        found.append(Stage(run, names, model.blocks[start:stop], moves if stop < len(blocks) else ()))
    return tuple(found)


def parts(model: Model, params: Params, batch: Batch) -> list[Part]:
    """Return what embeds, each block and the head.

    Raises:
      UsageError: the model has no split into blocks.
    """
    if model.embed is None or model.block is None or model.head is None or not model.blocks:
        raise UsageError(f"`{model.family}` is not split into blocks, so it cannot be cut into stages")
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    flat = {n: abstract(x) for n, x in tree.flatten(params).items()}
    carry = jax.tree.map(abstract, batch)
    block = model.block
    runs: list[Callable] = [
        lambda params, carry, name=name: block(name, subtree(params, name), carry) for name in model.blocks
    ]
    found = []
    for run, prefix in zip([model.embed, *runs, model.head], ["", *(f"{b}." for b in model.blocks), ""]):
        part, carry = _part(run, flat, carry, prefix)
        found.append(part)
    return found


def moving(blocks: Sequence[Part]) -> tuple[bool, ...]:
    """Say which arrays of the carry any block changes."""
    return tuple(not all(kept) for kept in zip(*(b.kept for b in blocks)))


def pick(params: Params, names: Sequence[str]) -> Params:
    """Return the leaves of these names, nested as in the whole."""
    flat = tree.flatten(params)
    return tree.nest({n: flat[n] for n in names})


def _part(run: Callable, flat: dict[str, Any], carry: Any, prefix: str) -> tuple[Part, Any]:
    names = sorted(n for n in flat if n.startswith(prefix))
    call = lambda params, carry: run(tree.nest(params), carry)
    closed, out = jax.make_jaxpr(call, return_shape=True)({n: flat[n] for n in names}, carry)
    jaxpr = closed.jaxpr
    used = {v for e in leaves.equations(jaxpr) for v in e.eqn.invars if not hasattr(v, "val")}
    used |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
    needed = tuple(n for n, v in zip(names, jaxpr.invars) if v in used)
    came = jaxpr.invars[len(names) :]
    kept = tuple(i < len(came) and v is came[i] for i, v in enumerate(jaxpr.outvars))
    own = [n.removeprefix(prefix) for n in names]
    consts = [c.tobytes().hex() if hasattr(c, "tobytes") else repr(c) for c in closed.consts]
    text = re.sub(r"0x[0-9a-f]+", "", f"{own} {jaxpr} {consts}")  # addresses of Python functions
    return Part(run, needed, kept, text), out


def _chain(runs: Sequence[Callable]) -> Callable:
    def run(params, carry):
        for each in runs:
            carry = each(params, carry)
        return carry

    return run
