"""Parameters that hand their squared gradients out, as leaves of `fishjax.leaves`.

`Tap`: each entry is used once, so the squares are formed where it is used, inside the backward pass:
under `vmap` over examples the use is a function of unbatched weights and batched activations, and the
cotangent of `sink` is sum_i (gradient_i)^2. `Hub`: used several times; each use hands out what its
gradient is made of, and the sum over uses is squared at the end.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fishjax.fisher import _census, _squares
from fishjax.leaves import Equation, Path
from fishjax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """A weight of which no entry is used twice."""

    w: Array  # [*p]
    sink: Array  # [*p], in max(float32, dtype): where the sum starts; its cotangent is it and the squares
    reached: Array  # []; its cotangent is 1 where that of the sink holds its start
    example: Array  # [], batched: so that every use is, even of what does not depend on the example

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.w.dtype

    def materialise(self) -> Array:
        """Copy the weight for each example."""
        return self._use(None, None, lambda w: [w], [])[0]

    def stacked(self, length: int) -> "Tap":
        """Prepare for a scan over the weight's leading axis."""
        lead = lambda x: jnp.broadcast_to(x, (length,))
        return dataclasses.replace(self, reached=lead(self.reached), example=lead(self.example))

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any]:
        """Follow what only moves entries; use the weight in anything else."""
        if _census.is_structural(equation):
            weights = equation.bind({variable: self.w})
            cast = equation.name == "convert_element_type"
            sinks = [self.sink] if cast else equation.bind({variable: self.sink})
            return [dataclasses.replace(self, w=w, sink=s) for w, s in zip(weights, sinks, strict=True)]
        if not _census.has_gradient(equation):
            return equation.bind({**values, variable: self.w})
        others = [v for v in values if v is not variable]

        def op(w, *xs):
            return equation.bind({variable: w, **dict(zip(others, xs, strict=True))})

        return self._use(equation, variable, op, [values[v] for v in others])

    def _use(self, equation, variable, op, xs):
        @custom_vmap
        def use(example, w, sink, reached, *xs):
            return op(w, *xs)

        @use.def_vmap
        def _(size, batched, example, w, sink, reached, *xs):
            axes = tuple(0 if b else None for b in batched[4:])
            many = jax.vmap(op, (0 if batched[1] else None, *axes), axis_size=size)

            @jax.custom_vjp
            def squared(w, sink, reached, *xs):
                return many(w, *xs)

            def backward(saved, g):
                w, sink, xs = saved
                _, pull = jax.vjp(lambda *xs: many(w, *xs), *xs)
                dxs, g = pull(g), floats(g)
                if batched[2]:  # a batched `cond` has become a select, which copies its operands
                    one = _squares.of_one(smooth, sink.dtype)
                    each = jax.vmap(one, (0 if batched[1] else None, 0, *axes))
                    return None, each(w, g, *xs), jnp.zeros(reached_shape), *dxs
                add = _squares.over_rows(equation, variable, smooth, axes)
                return None, add(sink, w, g, *xs), jnp.ones(()), *dxs

            smooth = lambda w, *xs: floats(op(w, *xs))
            reached_shape = reached.shape
            squared.defvjp(lambda w, sink, reached, *xs: (many(w, *xs), (w, sink, xs)), backward)
            out = squared(w, sink, reached, *xs)
            return out, jax.tree.map(lambda _: True, out)

        return use(self.example, self.w, self.sink, self.reached, *xs)


Channel = tuple[tuple[Array, ...], tuple[Array, ...]]  # zeros like a use's other operands and its outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hub:
    """A weight that is used several times, each time in a matmul, a convolution or a row lookup."""

    w: Array  # [*p]
    channels: dict[Path, Channel]  # by use; their cotangents are the use's operands and cotangents

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.w.dtype

    def materialise(self) -> Array:
        """Refuse: the census admits no such use."""
        raise AssertionError("a use that the census did not see; please report the function as a bug")

    def split_at_scan(self, path: Path) -> tuple["Hub", dict[Path, Channel]]:
        """Return what a scan keeps constant and the channels that it runs over."""
        return self, {p: c for p, c in self.channels.items() if p[: len(path)] == path}

    def with_scanned(self, channels: dict[Path, Channel]) -> "Hub":
        """Return the hub of one step."""
        return dataclasses.replace(self, channels=channels)

    def meet(self, equation: Equation, values: dict, variable: Any) -> list[Any]:
        """Follow what only moves entries; hand the others' operands and cotangents out."""
        if _census.is_structural(equation):
            return [dataclasses.replace(self, w=w) for w in equation.bind({variable: self.w})]
        if not _census.has_gradient(equation):
            return equation.bind({**values, variable: self.w})
        if equation.path not in self.channels:
            self.materialise()
        others = [v for v in values if v is not variable]

        def op(w, *xs):
            return equation.bind({variable: w, **dict(zip(others, xs, strict=True))})

        def forward(w, channel, *xs):
            # The zeros make the outputs, and so their cotangents, those of one example each.
            return [y + zero for y, zero in zip(op(w, *xs), channel[1], strict=True)]

        use = jax.custom_vjp(forward)

        def backward(saved, g):
            w, xs = saved
            _, pull = jax.vjp(lambda *xs: op(w, *xs), *xs)
            if equation.name == "gather":  # indices have no cotangent: they travel as exact floats
                handed = (_squares.row_ids(xs[0], w.shape[0], equation.params["mode"]).astype(jnp.float32),)
            else:
                handed = xs
            return None, (handed, tuple(g)), *pull(g)

        use.defvjp(lambda w, channel, *xs: (forward(w, channel, *xs), (w, xs)), backward)
        return use(self.w, self.channels[equation.path], *[values[v] for v in others])


def floats(values: list[Array]) -> list[Array]:
    """Return those that carry a gradient."""
    return [x for x in values if jnp.issubdtype(x.dtype, jnp.inexact)]
