"""What sits where: each leaf's part on a device, by rules, before anything is loaded."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.mesh._shard import AnyMesh, SpecRules, shapes_of, shardings
from fishjax.types import Params


class Row(NamedTuple):
    """Leaves of one kind: of all blocks, with the number of the block left out."""

    name: str  # `*` in the place of the number
    times: int
    dtype: str
    shape: tuple[int, ...]
    spec: tuple[Any, ...]
    whole: tuple[int, ...]  # dimensions left whole since their axes do not divide them
    bytes: int  # of all these leaves
    bytes_per_device: int


class Table(NamedTuple):
    """Where the leaves of a model lie; every device holds the same number of bytes."""

    axes: dict[str, int]
    rows: list[Row]

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.axes.values())

    @property
    def bytes(self) -> int:
        """All leaves, once."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """What each device holds."""
        return sum(row.bytes_per_device for row in self.rows)

    def __str__(self) -> str:
        lines = [("leaf", "", "dtype", "shape", "spec", "bytes per device")]
        for row in self.rows:
            spec = ", ".join(
                "whole" if d in row.whole else "-" if e is None else e if isinstance(e, str) else "+".join(e)
                for d, e in enumerate(row.spec)
            )
            times = f"x{row.times}" if row.times > 1 else ""
            shape = "x".join(map(str, row.shape)) or "-"
            lines.append((row.name, times, row.dtype, shape, spec or "-", f"{row.bytes_per_device:,}"))
        wide = [max(len(line[i]) for line in lines) for i in range(6)]
        text = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, wide[:5])), line[5].rjust(wide[5])])
            for line in lines
        ]
        share = self.bytes_per_device * self.devices / max(1, self.bytes)
        mesh = ", ".join(f"{n}={size}" for n, size in self.axes.items())
        text.append(
            f"each of {self.devices} devices ({mesh}): {self.bytes_per_device:,} of {self.bytes:,} bytes, "
            f"{share:.3f} x an equal share"
        )
        if any(row.whole for row in self.rows):
            text.append("whole: the axes of this dimension do not divide it, so every device holds all of it")
        return "\n".join(text)


def table(params: Params, rules: SpecRules, mesh: AnyMesh) -> Table:
    """Return where each leaf lies by ordered rules, how much of it a device holds, and the sums.

    Args:
      params: leaves `[*p]` or their shapes.
      rules, mesh, Raises: as for `shard`; a mesh without devices (`jax.sharding.AbstractMesh`) will do.

    >>> import jax
    >>> from jax.sharding import AbstractMesh, PartitionSpec
    >>> params = {"0": {"w": jax.ShapeDtypeStruct((8, 3), "float32")}}
    >>> found = table(params, [("w", PartitionSpec("fsdp", "fsdp"))], AbstractMesh((4,), ("fsdp",)))
    >>> found.rows[0].whole, found.bytes, found.bytes_per_device
    ((1,), 96, 24)
    """
    found, flat = shardings(params, rules, mesh), tree.flatten(shapes_of(params))
    wanted = tree.match(rules, flat)
    rows: dict[Any, Row] = {}
    for name, leaf in flat.items():
        sharding, size = found[name], np.dtype(leaf.dtype).itemsize
        spec, shape = tuple(sharding.spec), tuple(leaf.shape)
        asked = tuple(wanted[name])
        whole = tuple(d for d, e in enumerate(asked) if e is not None and spec[d] is None)
        kind = re.sub(r"\.\d+\.", ".*.", name)
        row = Row(kind, 1, str(leaf.dtype), shape, spec, whole, size * math.prod(shape), 0)
        row = row._replace(bytes_per_device=size * math.prod(sharding.shard_shape(shape)))
        same = kind, row.dtype, shape, spec
        if same in rows:
            old = rows[same]
            row = row._replace(
                times=old.times + 1,
                bytes=old.bytes + row.bytes,
                bytes_per_device=old.bytes_per_device + row.bytes_per_device,
            )
        rows[same] = row
    return Table(dict(mesh.shape), list(rows.values()))
