"""What a check sees, and what it says."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from fishjax.checkpoint import PatchFile
from fishjax.checkpoint._kinds import Change, fold, touched
from fishjax.errors import FileFormatError
from fishjax.types import Array, Batch, Example, Fisher, Params, Patch, TokenMask
from fishjax.vet._packs import Pack
from fishjax.vet._policy import Policy

Status: TypeAlias = Literal["pass", "warn", "fail", "skip"]


class Task(NamedTuple):
    """A patch that was accepted before, for the same base, and the tests that it claims to raise."""

    patch: Patch
    claims: Sequence[str] = ()


class Context(NamedTuple):
    """A patch, what it is for, and what is known about it.

    `base` holds arrays of numpy or jax, or is what `checkpoint.open_params` gives; `apply(params, batch)`
    gives the logits `[B, C]` or `[B, T, V]`, None if the model cannot be run here. A language model says
    by `labels` and `token_mask`, as `models.Model` has them, what its logits are compared to.
    """

    patch: Patch  # kinds of `patches`, or the `Change`s of a patch file
    base: Params
    apply: Callable[[Params, Batch], Array] | None = None
    tests: Sequence[Pack] = ()
    policy: Policy = Policy()
    metadata: Mapping[str, Any] = {}  # what its author says: `claims`, a list of tests that it raises
    source: PatchFile | None = None  # what the patch's file says; None for a patch in memory
    file: Path | None = None
    fisher: Fisher | None = None  # ranks the layers
    labels: Callable[[Example], Array] | None = None
    token_mask: TokenMask | None = None
    downstream: Mapping[str, Task] = {}  # to be applied again on the changed model
    findings: tuple["Finding", ...] = ()  # of the checks before this one

    @property
    def changes(self) -> dict[str, Change]:
        """The patch as host arrays, by leaf."""
        return as_changes(self.patch)


class Finding(NamedTuple):
    """What one check found. `details` holds plain values only: text, numbers, lists, mappings."""

    name: str
    status: Status
    exit_code: int
    summary: str
    details: dict[str, Any]


def blocked(context: Context) -> str | None:
    """Say why a patch is not to be applied: an earlier check found a misfit, NaN or infinity."""
    misfits = [
        f.name for f in context.findings if f.exit_code == 4 or (f.name == "structure" and f.exit_code)
    ]
    return f"not applied, see {', '.join(misfits)}" if misfits else None


def as_changes(patch: Patch) -> dict[str, Change]:
    """Return a patch as host arrays and static fields, by leaf; `Change`s stay as they are."""
    return {name: kind if isinstance(kind, Change) else _change(kind) for name, kind in patch.items()}


def fold_all(changes: Mapping[str, Change], base: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the patched leaves one at a time, `base` being leaves by name."""
    for name, change in changes.items():
        for target in touched(name, change):
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told by `size`
                new = fold(name, change, target, np.asarray(base[target]))
            yield target, new


def claims(context: Context) -> set[str]:
    """Return the tests that the patch claims to raise: `claims` of its metadata, a list of names."""
    found = context.metadata.get("claims", [])
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise FileFormatError(f"`claims` of the patch's metadata must be a list of test names; got {found!r}")
    return set(found)


def layer(name: str) -> str:
    """Return the layer of a leaf: its name up to the first part that ends in a number, else its first part.

    >>> layer("encoder.block.3.attention.q.weight"), layer("Dense_0.kernel"), layer("head.kernel"), layer("w")
    ('encoder.block.3', 'Dense_0', 'head', 'w')
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if re.search(r"\d$", part):
            return ".".join(parts[: i + 1])
    return parts[0]


def _change(kind: Any) -> Change:
    from fishjax.patches import KINDS

    arrays, static = {}, {}
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        if field.metadata.get("static"):
            static[field.name] = value
        else:
            arrays[field.name] = np.asarray(value)
    return Change(next(name for name, cls in KINDS.items() if cls is type(kind)), arrays, static)
