"""What is squared: the output of one example, and the cotangents s_k of which F = sum_k (J^T s_k)^2.

J is the Jacobian of the output with respect to the parameters. Every estimator is such a set of rows:
empirical has the loss and s = 1; exact has the columns of a square root of the Fisher of the output's
own distribution; sampled has `label - mean` with a label drawn from the model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.types import Array, Example, LogitsFn, LossFn, TokenMask

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


class Scores(NamedTuple):
    """One example's output and its rows of cotangents."""

    output: Callable[..., Array]  # (params, example) -> out
    check: Callable[[jax.ShapeDtypeStruct], None]  # raises on an output that makes no sense
    rows: Callable[[tuple[int, ...]], int]  # shape of out -> number of rows K
    row: Callable[..., Array]  # (out, example, key, k) -> s_k, like out
    is_silent: Callable[[Example], Array]  # whether no token counts


def of_loss(loss_fn: LossFn) -> Scores:
    """The gradient of the loss itself."""

    def check(out):
        if out.shape or not jnp.issubdtype(out.dtype, jnp.floating):
            raise UsageError(
                f"`loss_fn` must return a floating-point scalar for one example; got {_show(out)}. "
                "Sum over tokens inside it, and do not give it a batch axis"
            )

    return Scores(
        loss_fn, check, lambda shape: 1, lambda out, *_: jnp.ones_like(out), lambda _: jnp.array(False)
    )


def of_exact(logits_fn: LogitsFn, likelihood: str, token_mask: TokenMask | None, max_rows: int) -> Scores:
    """The columns of a square root of the output's Fisher, one token at a time."""

    def rows(shape):
        count = math.prod(shape) - (math.prod(shape[:-1]) if likelihood == "categorical" else 0)
        if count > max_rows:
            raise UsageError(
                f"`exact` would need {count} backward passes an example for outputs of shape {list(shape)}, "
                f"more than `max_rows={max_rows}`; use `fisher.sampled`, or raise `max_rows`"
            )
        return count

    def row(logits, example, key, k):
        logits = logits.astype(tree.wide_dtype(logits.dtype))
        tokens = jnp.atleast_2d(logits)  # [T, C]
        each = tokens.shape[1] - (likelihood == "categorical")
        t, c = k // each, k % each
        s = jnp.zeros_like(tokens).at[t].set(_SQUARE_ROOTS[likelihood](tokens[t], c))
        return _masked(s, example, token_mask).reshape(logits.shape)

    return Scores(logits_fn, _check_logits(likelihood, token_mask), rows, row, _is_silent(token_mask))


def of_sampled(logits_fn: LogitsFn, likelihood: str, token_mask: TokenMask | None, draws: int) -> Scores:
    """`label - mean` for labels drawn from the model, all tokens at once: cross terms have mean zero."""

    def row(logits, example, key, k):
        logits = logits.astype(tree.wide_dtype(logits.dtype))
        s = _DRAWN[likelihood](jax.random.fold_in(key, k), logits) / math.sqrt(draws)
        return _masked(jnp.atleast_2d(s), example, token_mask).reshape(logits.shape)

    check = _check_logits(likelihood, token_mask)
    return Scores(logits_fn, check, lambda shape: draws, row, _is_silent(token_mask))


def _categorical_column(logits: Array, c: Array) -> Array:
    """Column c of the Cholesky factor of diag(p) - p p^T, in log space: `[C]`.

    With q_c the probability of the classes after c, the column is sqrt(p_c q_c / (p_c + q_c)) times
    (e_c - p restricted to the classes after c, normalised). C - 1 columns are enough. Saturated
    probabilities lose nothing: no difference of near numbers is formed.
    """
    from_c = jax.lax.cumlogsumexp(logits, reverse=True)  # log(p_c + q_c), up to a constant
    after_c = jnp.append(from_c[1:], -jnp.inf)
    log_size = logits + after_c - from_c - from_c[0]
    size = jnp.where(jnp.isfinite(log_size[c]), jnp.exp(0.5 * log_size[c]), 0)  # classes at -inf have no part
    index = jnp.arange(logits.size)
    later = jnp.exp(logits - jnp.where(jnp.isfinite(after_c[c]), after_c[c], 0))
    return size * jnp.where(index == c, 1, jnp.where(index > c, -later, 0))


def _bernoulli_column(logits: Array, c: Array) -> Array:
    deviation = jnp.exp(0.5 * (jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)))
    return jnp.where(jnp.arange(logits.size) == c, deviation, 0)


def _gaussian_column(mean: Array, c: Array) -> Array:
    return jnp.where(jnp.arange(mean.size) == c, jnp.ones_like(mean), 0)


def _drawn_categorical(key, logits):
    label = jax.random.categorical(key, logits)
    return jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype) - jax.nn.softmax(logits)


def _drawn_bernoulli(key, logits):
    p = jax.nn.sigmoid(logits)
    return jax.random.bernoulli(key, p).astype(logits.dtype) - p


def _drawn_gaussian(key, mean):
    return jax.random.normal(key, mean.shape, mean.dtype)


_SQUARE_ROOTS = dict(
    zip(LIKELIHOODS, (_categorical_column, _bernoulli_column, _gaussian_column), strict=True)
)
_DRAWN = dict(zip(LIKELIHOODS, (_drawn_categorical, _drawn_bernoulli, _drawn_gaussian), strict=True))


def _masked(s: Array, example: Example, token_mask: TokenMask | None) -> Array:
    if token_mask is None:
        return s
    keep = jnp.asarray(token_mask(example))
    if keep.shape != s.shape[:1]:
        raise UsageError(f"`token_mask` must return one value a token, [{s.shape[0]}]; got {_show(keep)}")
    return jnp.where(keep.astype(bool)[:, None], s, 0)


def _is_silent(token_mask: TokenMask | None) -> Callable[[Example], Array]:
    if token_mask is None:
        return lambda _: jnp.array(False)
    return lambda example: ~jnp.any(jnp.asarray(token_mask(example)).astype(bool))


def _check_logits(likelihood: str, token_mask: TokenMask | None) -> Callable[[jax.ShapeDtypeStruct], None]:
    def check(out):
        wanted = 1 if token_mask is None else 2
        if len(out.shape) != wanted or not jnp.issubdtype(out.dtype, jnp.floating):
            why = (
                "pass `token_mask` if it gives one row a token (all True where every token counts)"
                if token_mask is None
                else "leave `token_mask` out if it gives one row an example"
            )
            raise UsageError(
                f"`logits_fn` must return {'[C]' if wanted == 1 else '[T, V]'} floating-point logits for one "
                f"example; got {_show(out)}; {why}"
            )
        if likelihood == "categorical" and out.shape[-1] < 2:
            raise UsageError(
                f"a categorical likelihood needs at least 2 classes; got {_show(out)}. "
                "One yes-or-no logit: `likelihood='bernoulli'`; a regression: `likelihood='gaussian'`"
            )

    return check


def _show(out) -> str:
    return f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
