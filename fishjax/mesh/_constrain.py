"""A model whose activations stay divided by examples, however its parameters are divided."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fishjax import tree
from fishjax.mesh._shard import AnyMesh
from fishjax.models import Model
from fishjax.models._model import in_order
from fishjax.types import Batch, Params


def constrain(model: Model, mesh: AnyMesh) -> Model:
    """Return the model with what passes between its blocks, `[B, T, D]`, held whole in all axes but one.

    The compiler divides what nobody constrains as its operands are: after a lookup in an embedding
    `[V, D]` that is divided along D, the activations along D, and then every device works on every
    example. Take the loss under `jax.vmap(..., spmd_axis_name=...)`, as `train.make_step(over=...)` does,
    and the examples are held to these axes.

    Generation is unchanged. Inside a `shard_map` over the same mesh use the model itself.

    >>> from fishjax import mesh, models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> params, ids = model.init(jax.random.key(0)), jax.numpy.array([[3, 1]])
    >>> constrain(model, mesh.make({"fsdp": 1})).apply(params, {"input_ids": ids}).shape
    (1, 2, 11)
    """
    embed, block, head = model.embed, model.block, model.head
    assert embed is not None and block is not None and head is not None  # every family has them
    held = NamedSharding(mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, None, None))

    def hold(x: Any) -> Any:
        if getattr(x, "ndim", 0) != 3 or not tree.is_inexact(x):
            return x
        return jax.lax.with_sharding_constraint(x, held)

    def held_embed(params: Params, batch: Batch, *keys: Any) -> Any:
        return jax.tree.map(hold, embed(params, batch, *keys))

    def held_block(name: str, params: Params, carry: Any) -> Any:
        given = {id(x) for x in jax.tree.leaves(carry)}  # what is only handed on is held already
        return jax.tree.map(lambda x: x if id(x) in given else hold(x), block(name, params, carry))

    apply = in_order(held_embed, held_block, head, model.blocks)
    return model._replace(apply=apply, embed=held_embed, block=held_block)
