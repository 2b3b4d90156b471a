"""Pipelines: the blocks of a model spread over devices, stage after stage.

`staged` takes stages of any sizes, one compiled program each, arrays put from device to device: the way
for unequal devices. `pipelined` is one program over a mesh for equal stages: micro-batches move on by
`ppermute` (GPipe, arXiv 1811.06965). Both give what the model gives on one device, and its gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fishjax import patches
from fishjax.errors import StructureError, UsageError
from fishjax.mesh._stack import stack_params, stack_patch
from fishjax.mesh._stages import moving, parts, pick, stages
from fishjax.mesh._wire import carried, check_wire
from fishjax.models._model import Model
from fishjax.types import Array, Batch, Params, Patch


class Pipeline(NamedTuple):
    """A model on several devices.

    Fields:
      params: its parameters, where each stage needs them.
      apply: `apply(params, batch, patch=None) -> logits`; the patch names leaves of the whole model.
    """

    params: Any
    apply: Callable[..., Array]


def staged(
    model: Model,
    params: Params,
    batch: Batch,
    sizes: Sequence[int],
    *,
    devices: Sequence[Any] | None = None,
    micro: int = 1,
    wire: str = "float",
) -> Pipeline:
    """Return a pipeline of stages of any sizes, each compiled by itself on its own device.

    `apply` is not to be jitted; `jax.grad` passes through it, and the gradient of a patch comes back to
    where the patch is. Devices work at the same time on different micro-batches.

    Args:
      params: the whole model, leaves of `leaves.quantise` too.
      batch: one that the model takes, or its shapes.
      sizes: blocks of each stage, in order.
      devices: one a stage; None takes the first ones.
      micro: into how many parts a batch is divided; divides its rows.
      wire: "float", or "int8": what blocks change crosses as codes with a scale for 128 entries, and so
        do the cotangents.

    Raises:
      UsageError: sizes that do not fit, too few devices, rows that `micro` does not divide.

    >>> from fishjax import models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 6}
    >>> model = models.build(config | {"n_layer": 2})
    >>> params, batch = model.init(jax.random.key(0)), {"input_ids": jnp.array([[3, 1, 4]])}
    >>> line = staged(model, params, batch, [2])
    >>> line.apply(line.params, batch).shape
    (1, 3, 11)
    """
    check_wire(wire)
    cut = stages(model, params, batch, sizes)
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < len(cut):
        raise UsageError(f"{len(cut)} stages need as many devices; there are {len(devices)}")
    placed = tuple(jax.device_put(pick(params, s.names), d) for s, d in zip(cut, devices))
    runs = [jax.jit(patches.unfolded(s.run)) for s in cut]
    known = {n for s in cut for n in s.names}

    def cross(carry: Any, i: int) -> Any:
        arrays, structure = jax.tree.flatten(carry)
        there, back = (partial(jax.device_put, device=devices[j]) for j in (i + 1, i))
        sent = [carried(x, there, back, wire if moves else "float") for x, moves in zip(arrays, cut[i].moves)]
        return jax.tree.unflatten(structure, sent)

    def apply(params: Any, batch: Batch, patch: Patch | None = None) -> Array:
        check_rows(batch, micro)
        if odd := [n for n in patch or {} if n not in known]:
            raise StructureError(f"the patch changes `{odd[0]}`, which no stage has")
        own = [
            jax.device_put({n: k for n, k in (patch or {}).items() if n in s.names}, d)
            for s, d in zip(cut, devices)
        ]
        outs = []
        for part in _divide(batch, micro):
            carry = jax.device_put(part, devices[0])
            for i, run in enumerate(runs):
                carry = run(params[i], own[i], carry)
                carry = cross(carry, i) if i + 1 < len(runs) else carry
            outs.append(carry)
        return jnp.concatenate(outs)

    return Pipeline(placed, apply)


def pipelined(
    model: Model,
    params: Params,
    batch: Batch,
    mesh: Mesh,
    *,
    axis: str = "stage",
    micro: int = 1,
    wire: str = "float",
) -> Pipeline:
    """Return a pipeline of equal stages: one program in which each device runs its blocks.

    The parameters of the blocks are stacked and divided over the axis, the others are on all devices.
    Of `micro + stages - 1` steps a device works in `micro`. `apply` may be jitted and differentiated.

    Args:
      params, batch, micro, wire: as for `staged`.
      mesh: its `axis` has as many devices as there are stages.

    Raises:
      UsageError: blocks that differ or that the stages do not divide, a mesh without the axis, rows that
        `micro` does not divide.

    References: Huang et al. 2019, arXiv 1811.06965, section 2.

    >>> from fishjax import mesh, models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 6}
    >>> model = models.build(config | {"n_layer": 2})
    >>> params, batch = model.init(jax.random.key(0)), {"input_ids": jnp.array([[3, 1, 4]])}
    >>> line = pipelined(model, params, batch, mesh.make({"stage": 1}))
    >>> line.apply(line.params, batch).shape
    (1, 3, 11)
    """
    check_wire(wire)
    if axis not in mesh.shape:
        raise UsageError(f"the mesh has the axes {', '.join(mesh.shape)}; a pipeline needs `{axis}`")
    _, *blocks, _ = parts(model, params, batch)
    count = mesh.shape[axis]
    if len(blocks) % count:
        raise UsageError(
            f"{count} stages do not divide the {len(blocks)} blocks of this `{model.family}`; "
            "`mesh.staged` takes stages of any sizes"
        )
    for name, part in zip(model.blocks, blocks):
        if part.shape != blocks[0].shape:
            raise UsageError(
                f"the blocks `{model.blocks[0]}` and `{name}` differ, so they are no equal stages; "
                "`mesh.staged` takes blocks of any kind"
            )
    moves = moving(blocks)
    assert model.block is not None and model.embed is not None and model.head is not None
    block = patches.unfolded(partial(model.block, model.blocks[0]))
    embed, head = patches.unfolded(model.embed), patches.unfolded(model.head)
    divided, whole = PartitionSpec(axis), PartitionSpec()
    place = lambda tree_, spec: jax.device_put(tree_, NamedSharding(mesh, spec))
    outside, stacked = stack_params(model, params)
    placed = {"outside": place(outside, whole), "blocks": place(stacked, divided)}
    forth = [(i, i + 1) for i in range(count - 1)]

    def send(x: Array) -> Array:
        there = lambda x: lax.ppermute(x, axis, forth)
        back = lambda x: lax.ppermute(x, axis, [(j, i) for i, j in forth])
        return carried(x, lambda t: jax.tree.map(there, t), lambda t: jax.tree.map(back, t), wire)

    hand_out = partial(jax.tree.map, lambda x: x[-micro:])
    take_back = partial(
        jax.tree.map, lambda x: jnp.pad(x, [((count - 1) * micro, 0), *[(0, 0)] * (x.ndim - 1)])
    )

    def device(blocks: Params, patch: Patch, carry: list[Array], structure: Any) -> list[Array]:
        me, last = lax.axis_index(axis), micro - 1
        at = lambda xs, i: [lax.dynamic_index_in_dim(x, jnp.clip(i, 0, last), keepdims=False) for x in xs]
        first = [x for x, m in zip(carry, moves) if m]
        fixed = [x for x, m in zip(carry, moves) if not m]

        def through(state: list[Array], i: Array) -> list[Array]:
            rest = at(fixed, i)

            def one(state, own):
                arrays, others = iter(state), iter(rest)
                joined = jax.tree.unflatten(structure, [next(arrays if m else others) for m in moves])
                out = jax.tree.leaves(block(*own, joined))
                return [x for x, m in zip(out, moves) if m], None

            return lax.scan(one, state, (blocks, patch))[0]

        def step(state, t):
            state = [jnp.where(me == 0, new, old) for new, old in zip(at(first, t), state)]
            state = through(state, t - me)
            return [send(x) for x in state], state

        times = jnp.arange(micro + count - 1, dtype=jnp.int32)
        _, outs = lax.scan(step, at(first, jnp.int32(0)), times)
        return [x[count - 1 :] for x in outs]

    @jax.jit
    def apply(params: Any, batch: Batch, patch: Patch | None = None) -> Array:
        check_rows(batch, micro)
        blocks, outer, inner = stack_patch(model, params, patch or {})
        divide = lambda x: jnp.asarray(x).reshape(micro, -1, *jnp.shape(x)[1:])
        carry = jax.vmap(partial(embed, params["outside"], outer))(jax.tree.map(divide, batch))
        arrays, structure = jax.tree.flatten(carry)
        run = jax.shard_map(
            partial(device, structure=structure),
            mesh=mesh,
            in_specs=(divided, divided, whole),
            out_specs=divided,
            axis_names={axis},
            check_vma=False,
        )
        # Every device hands out what it computed; only the last stage's is the model's.
        ends = iter([carried(x, hand_out, take_back, wire) for x in run(blocks, inner, arrays)])
        carry = jax.tree.unflatten(structure, [next(ends) if m else x for x, m in zip(arrays, moves)])
        logits = jax.vmap(partial(head, params["outside"], outer))(carry)
        return logits.reshape(-1, *logits.shape[2:])

    return Pipeline(placed, apply)


def check_rows(batch: Batch, micro: int) -> None:
    """Raise unless a batch divides into micro-batches."""
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if type(micro) is not int or micro < 1 or any(n % micro for n in rows):
        raise UsageError(f"`micro` must divide the rows of a batch, {sorted(rows)}; got {micro}")


def _divide(batch: Batch, micro: int) -> list[Batch]:
    def part(x: Any, i: int) -> Any:
        size = x.shape[0] // micro
        return x[i * size : (i + 1) * size]

    return [jax.tree.map(partial(part, i=i), batch) for i in range(micro)]
