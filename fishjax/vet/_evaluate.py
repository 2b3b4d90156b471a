"""Run a model on test packs: which examples come out right, and how far two models' predictions are apart.

Everything goes through in chunks of equal size, so one compiled program serves all and no more than a
chunk of logits is held.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishjax import tree
from fishjax.errors import StructureError
from fishjax.types import Array, Params, Patch
from fishjax.vet._context import Context, as_changes, fold_all
from fishjax.vet._packs import Pack

ROWS = 64  # examples in a chunk
LOGITS = 1 << 24  # at most so many logits in a chunk
KL_EXAMPLES = 1024  # of a pack, the first ones: the mean needs no more

Arrays = Mapping[str, Array]


class Divergence(NamedTuple):
    """How far predictions moved, nats per prediction."""

    measured: float  # mean of KL(base || new)
    estimate: float  # half the mean variance of J·delta under the base's predictions
    predictions: int  # how many are in the mean


def models(context: Context) -> tuple[Params, Params]:
    """Return the base and the patched parameters on the device."""
    base = jax.tree.map(jnp.asarray, context.base)
    return base, patched(base, context.patch)


def patched(base: Params, patch: Patch) -> Params:
    """Return parameters with the leaves of a patch folded in as its file's digests want them."""
    flat = tree.flatten(base)
    return tree.rebuild(base, {**flat, **{n: jnp.asarray(x) for n, x in fold_all(as_changes(patch), flat)}})


def right(context: Context, params: Params, pack: Pack) -> np.ndarray:
    """Return bool `[B]`: the examples that come out as the pack wants; NaN never does."""
    parts = []
    for at, real in _chunks(context, params, pack):
        out = _logits(context, params, {k: x[at] for k, x in pack.batch.items()})
        hit = np.isfinite(out).all(-1)
        if pack.kind == "mft":
            label = _expected(context, pack, at)
            assert label is not None
            if label.shape != out.shape[:-1]:
                raise StructureError(
                    f"the labels of the test pack `{pack.name}` are {list(label.shape[1:])} an example; "
                    f"the model's predictions are {list(out.shape[1:-1])}"
                )
            hit &= out.argmax(-1) == label
        else:
            altered = _logits(context, params, {k: x[at] for k, x in {**pack.batch, **pack.changed}.items()})
            hit &= np.isfinite(altered).all(-1)
            if pack.kind == "inv":
                hit &= out.argmax(-1) == altered.argmax(-1)
            else:
                assert pack.label is not None
                gain = _log_p(altered) - _log_p(out)
                hit &= np.take_along_axis(gain, pack.label[at][:, None], -1)[:, 0] >= 0
        hit |= ~_counts(context, pack, at, out.shape)
        parts.append(hit.reshape(len(at), -1).all(-1)[:real])
    return np.concatenate(parts)


def divergence(context: Context, base: Params, new: Params, pack: Pack) -> Divergence:
    """Return how far a patch moves the predictions on a pack's inputs, measured and estimated.

    The estimate takes one `jax.jvp`, no second model and no Fisher: to second order in delta the KL is
    half the variance of the logits' change. (The diagonal Fisher's quadratic form drops the cross
    terms and was up to 290 times too small.)
    """
    flat = tree.flatten(new)
    # `patched` hands the other leaves on as they are.
    delta = {n: _difference(flat[n], x) for n, x in tree.flatten(base).items() if flat[n] is not x}
    moved = curved = 0.0
    count = 0
    for at, real in _chunks(context, base, pack, KL_EXAMPLES):
        batch = {k: jnp.asarray(x[at]) for k, x in pack.batch.items()}
        out, slope = (np.asarray(x, np.float64) for x in _pushed(context.apply, base, delta, batch))
        keep = _counts(context, pack, at, out.shape)
        keep[real:] = False
        log_p, log_q = _log_p(out[keep]), _log_p(_logits(context, new, batch)[keep])
        p, slope = np.exp(log_p), slope[keep]
        with np.errstate(invalid="ignore"):
            moved += float(np.where(p == 0, 0.0, p * (log_p - log_q)).sum())
        centred = slope - (p * slope).sum(-1, keepdims=True)
        curved += float(0.5 * (p * centred**2).sum())
        count += int(keep.sum())
    return Divergence(moved / max(count, 1), curved / max(count, 1), count)


def _chunks(
    context: Context, params: Params, pack: Pack, most: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield positions of equally many examples, and how many of them are no repeats."""
    assert context.apply is not None
    one = {k: x[:1] for k, x in pack.batch.items()}
    logits = math.prod(jax.eval_shape(context.apply, params, one).shape)
    size = min(pack.size, most or pack.size)
    rows = max(1, min(ROWS, size, LOGITS // logits))
    for start in range(0, size, rows):
        yield np.minimum(np.arange(start, start + rows), size - 1), min(rows, size - start)


def _expected(context: Context, pack: Pack, at: np.ndarray) -> np.ndarray | None:
    """Return labels as the model predicts them, int `[B]` or `[B, T]`; -100 does not count.

    A causal language model predicts the next token, so its labels are those of the batch moved by one:
    `context.labels` and `context.token_mask` know.
    """
    if pack.label is None or pack.label.ndim == 1 or context.labels is None:
        return None if pack.label is None else pack.label[at]
    batch = {k: jnp.asarray(x[at]) for k, x in pack.batch.items()}
    label = np.asarray(jax.vmap(context.labels)(batch))
    if context.token_mask is None:
        return label
    return np.where(np.asarray(jax.vmap(context.token_mask)(batch)), label, -100)


def _counts(context: Context, pack: Pack, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool, like the logits without their last axis: the predictions that count."""
    label = _expected(context, pack, at)
    if label is not None and label.shape == shape[:-1]:
        return label != -100
    mask = pack.batch.get("attention_mask")
    if mask is not None and (len(at), *mask.shape[1:]) == shape[:-1]:
        return np.asarray(mask[at]) != 0
    return np.ones(shape[:-1], bool)


@partial(jax.jit, static_argnums=0)
def _applied(apply, params, batch):
    return apply(params, batch)


@partial(jax.jit, static_argnums=0)
def _pushed(apply, params, delta, batch):
    """Return the logits and their change to first order when the leaves of `delta` move by it."""
    flat = tree.flatten(params)

    def of(moved):
        return apply(tree.rebuild(params, {**flat, **moved}), batch)

    return jax.jvp(of, ({n: flat[n] for n in delta},), (delta,))


def _logits(context: Context, params: Params, batch: Arrays) -> np.ndarray:
    out = _applied(context.apply, params, {k: jnp.asarray(x) for k, x in batch.items()})
    return np.asarray(out, np.float64)


def _difference(new: Array, old: Array) -> Array:
    return jnp.asarray((np.asarray(new, np.float64) - np.asarray(old, np.float64)).astype(old.dtype))


def _log_p(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which the callers tell
        shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
