"""Patches in fewer bytes than their values take, for whoever asks; what is lost is measured and told."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fishjax.checkpoint._kinds import Change, fold
from fishjax.errors import UsageError
from fishjax.tree import wide_dtype

MODES = ("bf16", "int8")
BLOCK = 64  # entries that share a scale


def shorten(
    mode: str, changes: Mapping[str, Change], base: Callable[[str], np.ndarray]
) -> tuple[dict[str, Change], dict[str, Any]]:
    """Return changes in fewer bytes, and how far their results are from the exact ones.

    Sparse and dense values are shortened; other kinds stay as they are. Scales are powers of two, so
    that a product with a code of eight bits is exact and every machine rounds the sum alike.

    Args:
      mode: "bf16": values rounded, where the leaf is wider; "int8": changes of the base, of each
        leaf whose values are wider than a byte.
      base: gives a leaf by name.

    Returns:
      The changes; and `{"mode": ..., "leaves": {name: {"max_error", "rms_error", "rms_change"}}}`,
      absolute, in the unit of the weights.
    """
    if mode not in MODES:
        raise UsageError(f"`lossy` must be one of {', '.join(map(repr, MODES))}, or None; got {mode!r}")
    short: dict[str, Change] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, change in changes.items():
        values = change.arrays.get("values")
        least = 2 if mode == "bf16" else 1
        if change.kind not in ("sparse", "dense") or values is None or values.dtype.itemsize <= least:
            short[name] = change
            continue
        weight = base(name)
        if mode == "bf16":
            arrays = {**change.arrays, "values": values.astype(ml_dtypes.bfloat16)}
            short[name] = change._replace(arrays=arrays)
        else:
            short[name] = _delta(change, weight)
        errors[name] = _error(name, change, short[name], weight)
    return short, {"mode": mode, "leaves": errors}


def _delta(change: Change, weight: np.ndarray) -> Change:
    wide = wide_dtype(weight.dtype)
    old = _at(weight, change).astype(wide)
    delta = change.arrays["values"].reshape(-1).astype(wide) - old
    blocks = np.zeros((-(-delta.size // BLOCK), BLOCK), wide)
    blocks.reshape(-1)[: delta.size] = delta
    top = np.abs(blocks).max(1, initial=0)
    # The least power of two with which the largest change fits into 127 steps.
    scales = np.exp2(np.ceil(np.log2(np.where(top > 0, top, 1) / 127)))
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[:, None]), -127, 127).astype(np.int8)
    codes = codes.reshape(-1)[: delta.size]
    kept = {k: x for k, x in change.arrays.items() if k == "indices"}
    return Change("delta", {**kept, "codes": codes, "scales": scales}, {"block": BLOCK})


def _at(weight: np.ndarray, change: Change) -> np.ndarray:
    flat = np.reshape(weight, -1)
    return flat[change.arrays["indices"].astype(np.int64)] if "indices" in change.arrays else flat


def _error(name: str, exact: Change, short: Change, weight: np.ndarray) -> dict[str, float]:
    old, new, got = (
        _at(x, exact).astype(np.float64)
        for x in (weight, fold(name, exact, name, weight), fold(name, short, name, weight))
    )
    rms = lambda x: float(np.sqrt(np.mean(x**2))) if x.size else 0.0
    return {
        "max_error": float(np.abs(got - new).max(initial=0)),
        "rms_error": rms(got - new),
        "rms_change": rms(new - old),
    }
