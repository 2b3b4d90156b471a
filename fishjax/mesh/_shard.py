"""Where leaves lie on a mesh of devices: parameters by rules, all else as the parameters it belongs to.

One rule holds everywhere: a mesh axis that does not divide a dimension leaves that dimension whole
(replicated). `mesh.table` shows where that happened.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from fishjax import leaves, tree
from fishjax.errors import UsageError
from fishjax.patches._stack import Rows
from fishjax.types import Batch, Params

SpecRules = tree.Rules[PartitionSpec]
AnyMesh = Mesh | AbstractMesh

BATCH = ("data", "fsdp")  # the axes over which examples are spread, where a mesh has them


def make(axes: Mapping[str, int]) -> Mesh:
    """Return a mesh of the first devices, all axes `AxisType.Auto`: the compiler places what is between.

    Args:
      axes: `{name: devices along it}`, at least one. `rules` knows "data" (batches), "fsdp" (batches, and
        parameters gathered where they are used), "tensor" (parameters that stay apart) and "stage".

    Raises:
      UsageError: a size below 1, or fewer devices than wanted.

    >>> make({"data": 1}).axis_names
    ('data',)
    """
    if not axes or any(type(n) is not int or n < 1 for n in axes.values()):
        raise UsageError(
            f"`axes` must give each axis a whole number of devices, at least 1; got {dict(axes)}"
        )
    wanted, devices = math.prod(axes.values()), jax.devices()
    if wanted > len(devices):
        raise UsageError(
            f"a mesh of {_sizes(axes)} needs {wanted} devices; there are {len(devices)} "
            f"({devices[0].platform}). Make the mesh smaller, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    auto = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=devices[:wanted])


def shardings(params: Params, rules: SpecRules, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Return where each leaf goes by ordered rules, as `models.load` takes it.

    Args:
      params: leaves `[*p]`, or their shapes (`jax.ShapeDtypeStruct`); an array-type leaf counts as one.
      rules: `(regex, PartitionSpec)`, `re.search` on the leaf's name, the first match wins; a spec
        may be shorter than the leaf's rank, the rest is whole.
      mesh: devices, or only their numbers (`AbstractMesh`).

    Raises:
      UsageError: a rule that matches no leaf, a leaf that no rule covers (near names are listed), a
        spec with more entries than the leaf has dimensions, an axis that the mesh does not have.

    >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 6), "float32"), "b": jax.ShapeDtypeStruct((3,), "float32")}
    >>> found = shardings(params, [("", PartitionSpec("tensor"))], mesh)
    >>> tuple(found["w"].spec), tuple(found["b"].spec)  # 2 does not divide 3
    (('tensor', None), (None,))
    """
    flat = tree.flatten(shapes_of(params))
    wanted = tree.match(rules, flat)
    if bare := [n for n in flat if n not in wanted]:
        raise UsageError(
            f"no sharding rule covers {_some(bare)}; the rules are {_some([p for p, _ in rules])}. Add one, "
            'or end with ("", PartitionSpec()), which replicates the rest'
        )
    for name, spec in wanted.items():
        if len(spec) > len(flat[name].shape):
            raise UsageError(
                f"{spec} has more entries than `{name}` has dimensions: {list(flat[name].shape)}"
            )
        if odd := [a for entry in spec for a in _axes(entry) if a not in mesh.shape]:
            raise UsageError(
                f"{spec} of `{name}` needs the axis `{odd[0]}`; the mesh has {_sizes(mesh.shape)}"
            )
    return {n: NamedSharding(mesh, fitting(flat[n].shape, spec, mesh)) for n, spec in wanted.items()}


def shard(params: Params, rules: SpecRules, mesh: AnyMesh) -> Params:
    """Return the parameters laid out over a mesh by ordered rules.

    Shapes (`jax.ShapeDtypeStruct`) come back as shapes with shardings, to compile for devices that are
    not there. Everything else in the library takes sharded parameters as they are: `jax.jit` with
    these shardings is what used to be spelled `pjit`.

    Args:
      params: leaves `[*p]`; the arrays inside an array-type leaf are divided like the leaf.
      rules, mesh, Raises: as for `shardings`.

    >>> mesh = make({"fsdp": 1})
    >>> params = shard({"w": np.ones((4, 2), np.float32)}, [("w", PartitionSpec("fsdp"))], mesh)
    >>> tuple(params["w"].sharding.spec)
    ('fsdp', None)
    """
    return _placed(params, shardings(params, rules, mesh))


def follow(tree_: Any, params: Params) -> Any:
    """Return a patch, Fisher, mask or training state laid out like the parameters that it belongs to.

    An array belongs to the leaf whose name is in its path (a patch's keys, a moment's place). Its
    dimensions are divided like those of the leaf where that is possible: a `Scale` or `LowRank` factor
    along the axes that it has, a Fisher or a mask everywhere, patches side by side (`patches.stack`) behind
    the axis of the patches, which is whole. What belongs to no leaf, and flat lists of positions and values
    (`Sparse`), is replicated.

    Args:
      tree_: any pytree of arrays, or of shapes.
      params: leaves on a mesh; if they are on one device, `tree_` comes back as it is.

    >>> mesh = make({"fsdp": 1})
    >>> params = shard({"w": np.ones((4, 2), np.float32)}, [("w", PartitionSpec("fsdp"))], mesh)
    >>> tuple(follow({"w": np.zeros((4, 1))}, params)["w"].sharding.spec)
    ('fsdp', None)
    """
    found = _of(params)
    return _placed(tree_, found) if found else tree_


def shard_batch(batch: Batch, mesh: AnyMesh | None) -> Batch:
    """Return a batch whose examples are spread over the axes "data" and "fsdp" of a mesh.

    Of several processes each passes the whole batch and keeps its part. A size that the devices do not
    divide is replicated.

    Args:
      batch: arrays `[B, ...]`, or their shapes.
      mesh: None, or a mesh without these axes, changes nothing but the devices.

    >>> shard_batch({"x": np.ones((4, 2))}, make({"data": 1}))["x"].sharding.spec[0]
    'data'
    """
    if mesh is None:
        return batch
    axes = batch_axes(mesh)
    entry = axes if len(axes) > 1 else axes[0] if axes else None
    spec = lambda x: fitting(x.shape, PartitionSpec(entry) if x.shape else PartitionSpec(), mesh)
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, spec(x))), batch)


def batch_axes(mesh: AnyMesh | None) -> tuple[str, ...]:
    """Return the axes of a mesh over which examples are spread: "data" and "fsdp", as far as it has them.

    >>> batch_axes(AbstractMesh((4, 2), ("fsdp", "tensor"))), batch_axes(None)
    (('fsdp',), ())
    """
    return tuple(a for a in BATCH if mesh is not None and a in mesh.shape)


def gather(tree_: Any) -> Any:
    """Return a tree whole on every process; what is already within reach comes back as it is.

    All processes must call it together.

    >>> gather({"w": np.ones(2)})["w"].shape
    (2,)
    """

    def whole(x: Any) -> Any:
        if getattr(x, "is_fully_addressable", True):
            return x
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree_)


def mesh_of(params: Params) -> AnyMesh | None:
    """Return the mesh on which parameters lie; None if they are on one device.

    >>> mesh_of({"w": np.ones(2)}) is None
    True
    """
    return next((s.mesh for s, _ in _of(params).values()), None)


def fitting(shape: Sequence[int], spec: PartitionSpec, mesh: AnyMesh) -> PartitionSpec:
    """Return a spec of full rank: a dimension that its axes do not divide is left whole.

    >>> tuple(fitting((6, 5), PartitionSpec("x", None), AbstractMesh((2,), ("x",))))
    ('x', None)
    """
    fits = lambda n, entry: n % math.prod(mesh.shape[a] for a in _axes(entry)) == 0
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(*(e if fits(n, e) else None for n, e in zip(shape, entries)))


def _placed(tree_: Any, where: Mapping[str, Any]) -> Any:
    """Put every array of a tree where the leaf that it belongs to lies."""
    where = {n: s if isinstance(s, tuple) else (s, len(s.spec)) for n, s in where.items()}
    mesh, side_by_side = next(iter(where.values()))[0].mesh, _in_rows(tree_)

    def place(path: str, x: Any) -> Any:
        if hasattr(x, "shardings") and path in where:
            return jax.tree.map(_put, x, x.shardings(where[path][0]))
        if leaves.is_leaf(x):
            return jax.tree.map(lambda part: place(path, part), x)
        sharding, rank = where.get(_owner(path, where), (None, 0))
        rows, spec = int(path in side_by_side), PartitionSpec()
        # A flat list of entries has fewer dimensions than the leaf: none of them is one of the leaf's.
        if sharding is not None and len(x.shape) >= rows + rank:
            spec = PartitionSpec(*[None] * rows, *sharding.spec)
        return _put(x, NamedSharding(mesh, fitting(x.shape, spec, mesh)))

    return tree.map_named(place, tree_)


def _in_rows(tree_: Any) -> set[str]:
    """Return the names of the arrays that hold several patches side by side."""
    is_rows = lambda x: isinstance(x, Rows)
    return set(tree.names(jax.tree.map(lambda x: x if is_rows(x) else None, tree_, is_leaf=is_rows)))


def _owner(path: str, where: Mapping[str, Any]) -> str:
    """Return the leaf whose name stands in a path: the longest, of several the first; "" if there is none."""
    if path in where:
        return path
    parts = path.split(".")
    spans = [(i, j) for i in range(len(parts)) for j in range(len(parts), i, -1)]
    spans.sort(key=lambda span: span[0] - span[1])  # stable: the longest first, and of these the leftmost
    return next((name for i, j in spans if (name := ".".join(parts[i:j])) in where), "")


def _of(params: Params) -> dict[str, tuple[NamedSharding, int]]:
    """Return the sharding and rank of each leaf that lies on a mesh."""
    found = {}
    whole, names = jax.tree.leaves(params, is_leaf=leaves.is_leaf), tree.names(shapes_of(params))
    for name, leaf in zip(names, whole, strict=True):
        rank = len(leaf.shape)
        for x in [leaf] if hasattr(leaf, "shardings") else jax.tree.leaves(leaf):
            sharding = getattr(x, "sharding", None)
            if isinstance(sharding, NamedSharding) and len(x.shape) == rank:
                spec = PartitionSpec(*sharding.spec, *[None] * (rank - len(sharding.spec)))
                found[name] = NamedSharding(sharding.mesh, spec), rank
                break
    return found


def _put(x: Any, sharding: Sharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])


def shapes_of(params: Params) -> Params:
    """Return shapes and dtypes in the place of leaves; an array-type leaf counts as one."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, params, is_leaf=leaves.is_leaf)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _sizes(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{n}={size}" for n, size in axes.items())


def _some(items: Sequence[str], most: int = 4) -> str:
    text = ", ".join(f"`{i}`" for i in items[:most])
    return text + (f" and {len(items) - most} more" if len(items) > most else "")
