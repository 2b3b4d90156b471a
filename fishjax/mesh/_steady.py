"""A model whose activations stay divided by examples, however its parameters are divided."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fishjax.models import Model
from fishjax.types import Array, Batch, Params


def steady(model: Model, mesh: Mesh) -> Model:
    """Return the model with what passes between its blocks held whole in all axes but the first.

    The compiler divides what nobody constrains as its operands are. After the lookup in an embedding
    `[V, D]` that is divided along D that would be the activations along D, every device then working on
    every example.
    """
    embed, block = model.embed, model.block
    assert embed is not None and block is not None

    def hold(x: Any) -> Any:
        if not (hasattr(x, "ndim") and x.ndim == 3 and jnp.issubdtype(x.dtype, jnp.inexact)):
            return x
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, *[None] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def steady_embed(params: Params, batch: Batch, *keys: Any) -> Any:
        return jax.tree.map(hold, embed(params, batch, *keys))

    def steady_block(name: str, params: Params, carry: Any) -> Any:
        return jax.tree.map(hold, block(name, params, carry))

    def apply(params: Params, batch: Batch) -> Array:
        from fishjax.models._model import subtree
        carry = steady_embed(params, batch)
        for name in model.blocks:
            carry = steady_block(name, subtree(params, name), carry)
        return model.head(params, carry)

    return model._replace(apply=apply, embed=steady_embed, block=steady_block)
