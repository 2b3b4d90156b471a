"""Size: how much a patch changes, where that sits, and how far the predictions move."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from fishjax import tree
from fishjax.checkpoint._digest import flat_leaves, leaf_digest, leaf_specs
from fishjax.checkpoint._dtypes import num_bytes
from fishjax.checkpoint._kinds import Change, touched
from fishjax.errors import FileFormatError
from fishjax.types import Array
from fishjax.vet._context import Context, Finding, blocked, claims, fold_all, layer

CHUNK = 1 << 22  # entries compared at a time


class Moved(NamedTuple):
    """How much of some leaves changes; sums of squares in float64."""

    changed: int = 0  # entries of which a bit changes
    entries: int = 0
    delta: float = 0.0  # sum of squared changes
    theta: float = 0.0  # sum of squared weights, before
    curved: float = 0.0  # half the sum of Fisher times squared change

    def __add__(self, other):
        return Moved(*(a + b for a, b in zip(self, other)))

    @property
    def relative(self) -> float:
        """|change| / |weights|; infinite where the weights were all zero and are no more."""
        if self.delta == 0:
            return 0.0
        return math.sqrt(self.delta / self.theta) if self.theta else math.inf


def size(context: Context) -> Finding:
    """Hold the size of the change to the policy's limits; a patch that changes nothing fails.

    The norm is relative to the leaves that are touched, so the rest of the model is never read. Where the
    model can be run, the KL from the base's predictions to the new ones is measured on the held
    tests' inputs; the diagonal Fisher only ranks layers.
    """
    if reason := blocked(context):
        return Finding("size", "skip", 0, reason, {})
    changes, specs = context.changes, leaf_specs(context.base)
    by_layer = compare(context, changes)
    total = sum(by_layer.values(), Moved())
    entries = sum(math.prod(s.shape) for s in specs.values())
    model_bytes = sum(num_bytes(*s) for s in specs.values())
    parameters = sum(x.size for c in changes.values() for x in c.arrays.values() if x.dtype.kind not in "iub")
    file_bytes = context.file.stat().st_size if context.file else None
    measured = {
        "parameters": parameters,
        "fraction": parameters / max(entries, 1),
        "changed": total.changed,
        "entries": entries,
        "bytes": file_bytes,
        "file_fraction": file_bytes / model_bytes if file_bytes and model_bytes else None,
        "relative_norm": total.relative,
    }
    names = {target for name, change in changes.items() for target in touched(name, change)}
    faults = _over(context, measured) + _misplaced(context, names, specs.keys())
    if total.delta == 0:  # a zero that only changes its sign is no change
        faults.append("the patch changes nothing")
    finite = math.isfinite(total.delta)
    if not finite:
        faults.append("the patched weights are not finite")
    details: dict[str, Any] = {**measured, "layers": _table(by_layer)}
    if finite and context.apply is not None and context.tests:
        details["kl"] = _kl(context, faults)
    if faults:
        return Finding("size", "fail", 1, "; ".join(faults), details)
    return Finding("size", "pass", 0, _summary(measured), details)


def compare(context: Context, changes: Mapping[str, Change]) -> dict[str, Moved]:
    """Return how much changes, by layer, folding one leaf at a time; results are held to their digests.

    Raises:
      FileFormatError: what comes out is not what the patch's file says.
    """
    base = flat_leaves(context.base)
    fisher = tree.flatten(context.fisher) if context.fisher is not None else {}
    results = context.source.result_digests if context.source else {}
    by_layer: dict[str, Moved] = defaultdict(Moved)
    for name, new in fold_all(changes, base):
        if name in results and leaf_digest(name, new) != results[name]:
            raise FileFormatError(
                f"`{name}` does not come out as the patch's file says; it contradicts itself"
            )
        by_layer[layer(name)] += _moved(base[name], new, fisher.get(name))
    return dict(by_layer)


def _moved(old: Array, new: np.ndarray, fisher: Array | None) -> Moved:
    old, new = np.asarray(old).reshape(-1), new.reshape(-1)
    weight = None if fisher is None else np.asarray(fisher).reshape(-1)
    total = Moved(entries=old.size)
    for start in range(0, old.size, CHUNK):
        before, after = old[start : start + CHUNK], new[start : start + CHUNK]
        where = np.flatnonzero(_bits(before) != _bits(after))
        wide = before.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            square = (after[where].astype(np.float64) - wide[where]) ** 2
            curved = 0.0
            if weight is not None:
                curved = 0.5 * float(square @ weight[start + where].astype(np.float64))
            total += Moved(len(where), 0, float(square.sum()), float(wide @ wide), curved)
    return total


def _bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits as integers: they compare ten times faster than bfloat16 does."""
    return array.view(f"u{array.dtype.itemsize}")


def _over(context: Context, measured: dict[str, Any]) -> list[str]:
    """Name the limits that are passed."""
    keys = ("parameters", "fraction", "bytes", "file_fraction", "relative_norm")
    limits = {k: getattr(context.policy, f"max_{k}") for k in keys}
    return [
        f"{key} is {measured[key]:.6g}, over `max_{key}` {limit:.6g}"
        for key, limit in limits.items()
        if limit is not None and measured[key] is not None and not measured[key] <= limit
    ]


def _misplaced(context: Context, names: Set[str], base: Collection[str]) -> list[str]:
    """Name the leaves that the policy does not let a patch touch."""
    allowed, forbidden = context.policy.allowed, context.policy.forbidden
    banned = sorted(names & tree.select(forbidden, base))
    outside = sorted(names - tree.select(allowed, base)) if allowed else []
    found = []
    if banned:
        found.append(f"it touches `{banned[0]}`, which `forbidden` names" + _more(banned))
    if outside:
        found.append(f"it touches `{outside[0]}`, which `allowed` does not name" + _more(outside))
    return found


def _kl(context: Context, faults: list[str]) -> dict[str, Any]:
    """Measure the divergence on every held test; tests that are claimed to rise are free to move."""
    from fishjax.vet import _evaluate

    base, new = _evaluate.models(context)
    claimed, found = claims(context), {}
    for pack in context.tests:
        kl = _evaluate.divergence(context, base, new, pack)
        found[pack.name] = {
            "measured": kl.measured,
            "jvp_estimate": kl.estimate,
            "predictions": kl.predictions,
        }
        own = context.policy.tests.get(pack.name, {}).get("max_kl")
        limit = context.policy.max_kl if own is None and pack.name not in claimed else own
        if not math.isfinite(kl.measured):
            faults.append(f"the new predictions on `{pack.name}` are not finite")
        elif limit is not None and kl.measured > limit:
            faults.append(f"the KL on `{pack.name}` is {kl.measured:.3g}, over `max_kl` {limit:.3g}")
    return found


def _table(by_layer: dict[str, Moved]) -> list[dict[str, Any]]:
    """Return one row a layer, largest share of the change first; by Fisher where there is one."""
    weigh = (lambda c: c.curved) if any(c.curved for c in by_layer.values()) else (lambda c: c.delta)
    whole = sum(weigh(c) for c in by_layer.values())
    rows = [
        {
            "layer": name,
            "changed": c.changed,
            "entries": c.entries,
            "relative_norm": c.relative,
            "share": weigh(c) / whole if whole else 0.0,
        }
        for name, c in by_layer.items()
    ]
    return sorted(rows, key=lambda row: (-row["share"], row["layer"]))


def _summary(measured: dict[str, Any]) -> str:
    text = f"{measured['parameters']:,} numbers ({measured['fraction']:.2%} of the model's)"
    text += f", |change|/|weights| {measured['relative_norm']:.3g}"
    if measured["bytes"] is not None:
        text += f", {measured['bytes']:,} bytes"
    return text


def _more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
