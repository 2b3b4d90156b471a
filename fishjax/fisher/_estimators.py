"""Estimators of the diagonal of the Fisher information, as init / update / finalize."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from fishjax import progress, tree
from fishjax.errors import UsageError
from fishjax.fisher import _auto, _one_pass, _reference, _scores, _sharded
from fishjax.types import Array, Batch, Fisher, LogitsFn, LossFn, Params, TokenMask

_ADD = {"one_pass": _one_pass.add_squares, "reference": _reference.add_squares}
METHODS = ("auto", "one_pass", "reference")


class FisherState(NamedTuple):
    """What has been summed so far; a pytree, so it can be saved and continued bit for bit."""

    total: Fisher  # sum over examples of squared scores, in max(float32, dtype of params)
    count: Array  # int32 [], examples seen
    silent: Array  # int32 [], examples of which the token mask selected nothing


class FisherEstimator(NamedTuple):
    """A way to estimate a Fisher: three functions."""

    init: Callable[[Params], FisherState]
    # (state, params, batch, key=None, *, sharding=None), jit-able; donate the state. Where the leading
    # axis of a batch is sharded, each device does its own examples; `jit` hides that: give it `sharding`
    # by `jax.jit(functools.partial(update, sharding=batch["x"].sharding), donate_argnums=0)`.
    update: Callable[..., FisherState]
    finalize: Callable[[FisherState], Fisher]  # the mean over examples


def empirical(
    loss_fn: LossFn, *, method: str = "auto", chunk_size: int | None = None, memory: int | None = None
) -> FisherEstimator:
    """Estimate with the labels of the data: the mean of the squared gradient of each example's loss.

    Args:
      loss_fn: `(params, example) -> scalar`, nats, for ONE example (no batch axis), summed over tokens.
      method: "one_pass" (squares formed inside one backward pass), "reference" (one gradient an
        example) or "auto" (`fisher.explain` tells what it takes, and why). All give the same numbers.
      chunk_size: examples at a time, at least 1; by default what is fastest or fits.
      memory: bytes that these may take beside parameters and result, in the place of `chunk_size`.

    Raises:
      UsageError: `loss_fn` does not return a scalar; a leaf of the parameters is not floating-point.

    >>> import jax.numpy as jnp
    >>> from fishjax import fisher
    >>> loss = lambda params, example: params["w"] @ example["x"]
    >>> batch = {"x": jnp.array([[1.0, 2.0], [3.0, 0.0]])}
    >>> fisher.estimate(fisher.empirical(loss), {"w": jnp.zeros(2)}, [batch])["w"].tolist()
    [5.0, 2.0]

    References: Sung et al., "Training neural networks with fixed sparse masks", arXiv:2111.09839, eq. 5.
    """
    return _estimator(_scores.of_loss(loss_fn), method, chunk_size, memory)


def sampled(
    logits_fn: LogitsFn,
    *,
    likelihood: str = "categorical",
    num_samples: int = 1,
    token_mask: TokenMask | None = None,
    method: str = "auto",
    chunk_size: int | None = None,
    memory: int | None = None,
) -> FisherEstimator:
    """Estimate with labels drawn from the model itself: unbiased for any number of classes.

    The draws of an example depend on the key and on its place in the stream, so splitting the same
    stream into other batches (with the same key) draws the same labels.

    Args:
      logits_fn: `(params, example) -> [C]`, or `[T, V]` with `token_mask`; for "gaussian" the means of
        a distribution of unit variance.
      likelihood: "categorical", "bernoulli" (independent yes-or-no outputs) or "gaussian".
      num_samples: draws per example, at least 1; each costs one backward pass.
      token_mask: `example -> bool [T]`: the tokens that count.
      method, chunk_size, memory: as for `empirical`.

    Raises:
      UsageError: no key was given; the logits have another rank; the token mask selects nothing.

    >>> import jax, jax.numpy as jnp
    >>> from fishjax import fisher
    >>> estimator = fisher.sampled(lambda params, x: params * x, likelihood="bernoulli", num_samples=9)
    >>> fisher.estimate(estimator, jnp.zeros(1), [jnp.ones((4, 1))], key=jax.random.key(0)).round(2).tolist()
    [0.25]

    References: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher", arXiv:1905.12558, eq. 3.
    """
    _check_choice("likelihood", likelihood, _scores.LIKELIHOODS)
    _check_positive("num_samples", num_samples)
    scores = _scores.of_sampled(logits_fn, likelihood, token_mask, num_samples)
    return _estimator(scores, method, chunk_size, memory, needs_key=True)


def exact(
    logits_fn: LogitsFn,
    *,
    likelihood: str = "categorical",
    token_mask: TokenMask | None = None,
    max_rows: int = 256,
    method: str = "auto",
    chunk_size: int | None = None,
    memory: int | None = None,
) -> FisherEstimator:
    """Take the expectation over the model's labels exactly.

    C classes need C - 1 backward passes on one forward pass (the Fisher of a softmax has that rank);
    Bernoulli and Gaussian outputs need C; with `token_mask`, as many for each of the T tokens.

    Args:
      logits_fn, likelihood, token_mask: as for `sampled`.
      max_rows: the most backward passes an example may need. Tokens that `token_mask` leaves out count
        too: which they are is known only when the program runs.
      method, chunk_size, memory: as for `empirical`.

    Raises:
      UsageError: more than `max_rows` backward passes would be needed (use `sampled`).

    >>> import jax.numpy as jnp
    >>> from fishjax import fisher
    >>> logits = lambda params, x: params * x
    >>> fisher.estimate(fisher.exact(logits), jnp.zeros(2), [jnp.ones((4, 2))]).tolist()
    [0.25, 0.25]

    References: Matena, Raffel, "Merging models with Fisher-weighted averaging", arXiv:2111.09832, eq. 3.
    """
    _check_choice("likelihood", likelihood, _scores.LIKELIHOODS)
    _check_positive("max_rows", max_rows)
    return _estimator(
        _scores.of_exact(logits_fn, likelihood, token_mask, max_rows), method, chunk_size, memory
    )


def estimate(
    estimator: FisherEstimator,
    params: Params,
    batches: Iterable[Batch],
    *,
    key: Array | None = None,
    state: FisherState | None = None,
) -> Fisher:
    """Return the diagonal Fisher: the mean over all examples of all batches.

    Args:
      params: a pytree of floating-point leaves `[*p]`.
      batches: an iterable of batches, each a pytree of arrays `[B, ...]`; B may differ between them. Where
        their leading axis has a `NamedSharding`, each device does its own examples.
      key: a random key, for estimators that draw labels.
      state: what `update` has summed of the batches before these, to go on from (with the same key, bit for
        bit). It is copied, not donated, and may come from a file.

    Returns:
      A tree like `params`, >= 0, in max(float32, dtype of the leaf).

    Raises:
      UsageError: `batches` is one batch, or empty; leading sizes differ; the result is not finite (the
        leaf is named).
      StructureError: `state` is of other parameters.

    >>> import jax.numpy as jnp
    >>> estimator = empirical(lambda params, x: params @ x)
    >>> first, second = jnp.ones((3, 2)), jnp.zeros((1, 2))
    >>> state = estimator.update(estimator.init(jnp.zeros(2)), jnp.zeros(2), first)
    >>> estimate(estimator, jnp.zeros(2), [second], state=state).tolist()
    [0.75, 0.75]
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise UsageError("`batches` must be an iterable of batches; got one batch: pass `[batch]`")
    update = jax.jit(estimator.update, donate_argnums=0, static_argnames="sharding")
    if state is None:
        state = _beside(estimator.init(params), params)
    else:
        tree.check_same(state.total, jax.eval_shape(init, params).total, ("state", "params"))
        state = jax.tree.map(jnp.copy, state)  # `update` donates its own
    checked = False
    for batch in progress.track(batches, description="Fisher"):
        state = update(state, params, batch, key, sharding=_sharded.sharding_of(batch))
        if not checked or state.silent > 0:  # what is wrong at once should not cost an hour
            estimator.finalize(state)
            checked = True
    if not checked:
        raise UsageError("`batches` is empty: a Fisher needs at least one example")
    return estimator.finalize(state)


def _estimator(scores, method, chunk_size, memory, needs_key=False) -> FisherEstimator:
    _check_choice("method", method, METHODS)
    for name, value in (("chunk_size", chunk_size), ("memory", memory)):
        if value is not None:
            _check_positive(name, value)

    def add(place, batch, total, params, seen, key):
        """Add a batch, or part number `place` of one, to a sum; return also how many were silent."""
        size = batch_size(batch)
        example = jax.tree.map(_first, batch)
        choice = _auto.choose(scores, params, example, method, chunk_size, memory)
        add_squares = _ADD[choice.method]
        chunks, each = _one_pass.split(size, choice.chunk_size)  # fewer examples pad than there are chunks
        number = jnp.arange(chunks * each, dtype=jnp.int32).reshape(chunks, each)
        first = seen + size * place

        def step(carry, number):
            total, silent = carry
            index, real = jnp.minimum(number, size - 1), number < size
            part = jax.tree.map(lambda x: jnp.asarray(x)[index], batch)
            keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(first + index)
            total = add_squares(scores, params, total, part, keys, real)
            new = jax.vmap(scores.is_silent)(part) & real
            return (total, silent + new.sum(dtype=jnp.int32)), None

        return jax.lax.scan(step, (total, jnp.int32(0)), number)[0]

    def update(
        state: FisherState,
        params: Params,
        batch: Batch,
        key: Array | None = None,
        *,
        sharding: NamedSharding | None = None,
    ) -> FisherState:
        check_params(params)
        if needs_key and key is None:
            raise UsageError("this estimator draws labels: pass `key=jax.random.key(seed)`")
        size = batch_size(batch)
        scores.check(jax.eval_shape(scores.output, params, jax.tree.map(_first, batch)))
        sharding = sharding or _sharded.sharding_of(batch)
        if sharding is None:
            total, silent = add(0, batch, state.total, params, state.count, key)
        else:
            zero = jax.tree.map(jnp.zeros_like, state.total)
            more, silent = _sharded.on_each(add, sharding)(batch, zero, params, state.count, key)
            total = jax.tree.map(jnp.add, state.total, more)
        return FisherState(total, state.count + jnp.int32(size), state.silent + silent)

    return FisherEstimator(init, update, finalize)


def init(params: Params) -> FisherState:
    """Return the state before the first example."""
    check_params(params)
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, tree.wide_dtype(p.dtype)), params)
    return FisherState(total, jnp.int32(0), jnp.int32(0))


def finalize(state: FisherState) -> Fisher:
    """Return the mean over examples; outside `jit` it is checked to be finite."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
        _check_state(state)
    return jax.tree.map(lambda x: x / state.count.astype(x.dtype), state.total)


def _beside(state: FisherState, params: Params) -> FisherState:
    """Return a new state on the one device to which parameters were put, if they were.

    There `update` leaves it; one that is nowhere yet would be another type, compiled for once more.
    """
    places = {x.sharding for x in jax.tree.leaves(params) if isinstance(x, jax.Array) and x.committed}
    one = len(places) == 1 and isinstance(next(iter(places)), SingleDeviceSharding)
    return jax.device_put(state, places.pop()) if one else state


def check_params(params: Params) -> None:
    """Raise unless every leaf is a real floating-point array."""
    for name, leaf in tree.flatten(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise UsageError(
                f"`{name}` is {jnp.result_type(leaf)}: a Fisher is of real floating-point leaves; split "
                "the others off with `tree.partition(params, tree.is_inexact)`"
            )


def batch_size(batch: Batch) -> int:
    """Return the leading size that all leaves of a batch share."""
    sizes = {}
    for name, leaf in tree.flatten(batch).items():
        shape = getattr(leaf, "shape", None)
        if not shape:
            raise UsageError(
                f"`{name}` of a batch must be an array with a leading batch axis; got {leaf!r:.60}"
            )
        sizes[name] = shape[0]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise UsageError(f"the leaves of a batch must share one leading size of at least 1; got {sizes}")
    return next(iter(sizes.values()))


def _check_state(state: FisherState) -> None:
    if state.count == 0:
        raise UsageError("no example was seen: a Fisher needs at least one")
    if state.silent > 0:
        raise UsageError(
            f"`token_mask` selects no token in {state.silent} of {state.count} examples; leave them out, "
            "or correct the mask"
        )
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), state.total)
    odd = [name for name, ok in tree.flatten(finite).items() if not ok]
    if odd:
        raise UsageError(
            f"the squared gradients of `{odd[0]}` are not finite (and those of {len(odd) - 1} other "
            "leaves); look for a logarithm of 0 or an overflow in the loss, for instance with the jax option "
            "`jax_debug_nans`"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"`{name}` must be an integer of at least 1; got {value!r}")


def _first(x: Any) -> jax.ShapeDtypeStruct:
    """One example's shape and dtype; int64 of numpy as jax takes it."""
    return jax.eval_shape(lambda x: x[0], x)
