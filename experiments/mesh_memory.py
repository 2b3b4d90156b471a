"""Memory per device of training a patch on a mesh, by compiling the step ahead of time: no weights are made.

    python -m experiments.mesh_memory --gin_file configs/t0_3b_memory.gin

What is compared: "activations" are what the same step needs beside its arguments on one device that holds all
parameters and one device's share of the examples. So a ratio of 1 is perfect sharding, and what is above it
is what the mesh adds: gathered weights, mostly. All is compiled with `CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`,
which `fishjax train` does not ask for: on CPUs it may need more than is shown here.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import gin_cli
from fishjax import contribute, mesh, models, train
from fishjax.types import Params

# By default XLA on CPUs starts whatever can start, all gathers of weights first; this holds memory down, as
# the schedulers of accelerators do.
OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Memory(NamedTuple):
    """Bytes on each device."""

    arguments: int  # parameters, patch, optimiser state, batch
    temporary: int  # all else, at the worst moment


def compiled(
    model: models.Model,
    make: Callable[..., contribute.Made],
    on: Mesh | None,
    *,
    batch_size: int,
    inputs: int,
    targets: int,
    remat: bool = True,
    scan: bool = False,
) -> Any:
    """Return the compiled training step of a sequence-to-sequence model, from shapes alone."""
    params: Params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = contribute.adam(1e-3, 1000)
    patch = jax.eval_shape(lambda p: make(None, p, model, []).patch, params)
    if scan:
        patch = jax.eval_shape(lambda patch: models.stack_patch(model, params, patch), patch)
        params = jax.eval_shape(lambda p: models.stack_blocks(model, p), params)
    state = jax.eval_shape(lambda patch: train.init(patch, optimizer), patch)
    if on is not None:
        params = mesh.shard(params, mesh.rules(models.scanned(model) if scan else model, on), on)
        state = mesh.follow(state, params)
    ids = lambda length: jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch = {"input_ids": ids(inputs), "attention_mask": ids(inputs), "labels": ids(targets)}
    step = contribute.make_step(model, optimizer, on, remat=remat, scan=scan)
    lowered = jax.jit(step, donate_argnums=0).lower(state, params, mesh.shard_batch(batch, on))
    return lowered.compile(compiler_options=OPTIONS)


def memory(program: Any) -> Memory:
    """Return what a compiled program needs of each device."""
    found = program.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes)


def run(
    *,
    config: dict[str, Any],
    make: Callable[..., contribute.Made],
    on: Callable[[], Mesh],
    batch_size: int = 16,
    inputs: int = 512,
    targets: int = 64,
    remat: bool = True,
    scan: bool = False,
    out: str | None = None,
) -> dict[str, float]:
    """Compile the step for a mesh and for one device, and print what each device needs.

    Args:
      config: the content of config.json.
      make: which patch, as of `contribute.run`.
      on: makes the mesh.
      batch_size: of all devices together. inputs, targets: tokens.
      remat, scan: as of `contribute.fit`.
      out: a JSON file for the numbers.
    """
    model, sizes = models.build(config), {"inputs": inputs, "targets": targets, "remat": remat, "scan": scan}
    the_mesh = on()
    share = batch_size
    for axis in mesh.batch_axes(the_mesh):
        share //= the_mesh.shape[axis]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if scan:
        shapes = jax.eval_shape(lambda p: models.stack_blocks(model, p), shapes)
    table = mesh.table(shapes, mesh.rules(models.scanned(model) if scan else model, the_mesh), the_mesh)
    print(table)
    spread = memory(compiled(model, make, the_mesh, batch_size=batch_size, **sizes))
    alone = memory(compiled(model, make, None, batch_size=share, **sizes))
    equal = table.bytes / table.devices
    result = {
        "parameters": table.bytes,
        "equal share": equal,
        "arguments per device": spread.arguments,
        "temporary per device": spread.temporary,
        "activations of one device's examples": alone.temporary,
        "ratio": (spread.arguments + spread.temporary) / (equal + alone.temporary),
    }
    for name, value in result.items():
        print(f"{name:38} {value:.3f}" if name == "ratio" else f"{name:38} {value / 1e6:12,.1f} MB")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 16)  # fake ones: enough for the configurations here
    gin_cli.main("mesh_memory.run", __doc__ or "")
