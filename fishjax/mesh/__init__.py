"""Models on more than one device: rules that lay parameters out over a mesh, and all that follows them.

    mesh = make({"fsdp": 4, "tensor": 2})
    params = shard(params, rules(model, mesh), mesh)

Functions of the other rooms run on such parameters unchanged, under `jax.jit` with `NamedSharding`
(what used to be spelled `pjit`).
"""

from fishjax.mesh._connect import connect
from fishjax.mesh._constrain import constrain
from fishjax.mesh._pipeline import Pipeline, pipelined, staged
from fishjax.mesh._rules import rules
from fishjax.mesh._shard import (
    AnyMesh,
    SpecRules,
    batch_axes,
    follow,
    gather,
    make,
    mesh_of,
    shapes_of,
    shard,
    shard_batch,
    shardings,
)
from fishjax.mesh._stages import Stage, stages
from fishjax.mesh._table import Row, Table, table

__all__ = [
    "AnyMesh",
    "Pipeline",
    "Row",
    "SpecRules",
    "Stage",
    "Table",
    "batch_axes",
    "connect",
    "constrain",
    "follow",
    "gather",
    "make",
    "mesh_of",
    "pipelined",
    "rules",
    "shard",
    "shard_batch",
    "shapes_of",
    "shardings",
    "staged",
    "stages",
    "table",
]
