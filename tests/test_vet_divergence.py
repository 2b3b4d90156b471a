"""Measured KL and its `jvp` estimate against dense float64 arithmetic, and what the diagonal form misses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import fisher, patches, vet
from fishjax.vet import _evaluate

pytestmark = pytest.mark.usefixtures("quick")

N, WIDTH, CLASSES = 150, 5, 3  # three chunks, the last one short


def apply(params, batch):
    logits = jnp.einsum("...i,ic->...c", batch["x"], params["w"])
    return logits + jnp.broadcast_to(params["b"], logits.shape)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(WIDTH, CLASSES)), "b": rng.normal(size=CLASSES)}
    delta = {"w": 0.3 * rng.normal(size=(WIDTH, CLASSES)), "b": np.zeros(CLASSES)}
    return base, delta, rng.normal(size=(N, WIDTH)), rng.integers(0, CLASSES, N)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def by_hand(base, delta, x):
    """Return KL and half the variance of J·delta for each example, in float64."""
    p = softmax(x @ base["w"] + base["b"])
    q = softmax(x @ (base["w"] + delta["w"]) + base["b"] + delta["b"])
    slope = x @ delta["w"] + delta["b"]
    kl = (p * np.log(p / q)).sum(-1)
    return kl, 0.5 * ((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2)


def measure(base, delta, batch, label, dtype):
    cast = lambda t: jax.tree.map(lambda x: jnp.asarray(x, dtype), t)
    patch = {"w": patches.Dense(jnp.asarray(base["w"] + delta["w"], dtype))}
    pack = vet.pack("p", {**{k: np.asarray(v, dtype) for k, v in batch.items()}, "labels": label})
    context = vet.Context(patch, cast(base), apply, tests=(pack,))
    return _evaluate.divergence(context, *_evaluate.models(context), pack)


def test_kl_and_estimate_are_those_of_dense_float64(case, x64):
    base, delta, x, label = case
    got = measure(base, delta, {"x": x}, label, np.float64)
    kl, half_variance = by_hand(base, delta, x)
    assert got.predictions == N
    assert got.measured == pytest.approx(kl.mean(), rel=1e-12)
    assert got.estimate == pytest.approx(half_variance.mean(), rel=1e-12)


def test_in_float32_they_agree_to_its_precision(case):
    base, delta, x, label = case
    got = measure(base, delta, {"x": x}, label, np.float32)
    kl, half_variance = by_hand(base, delta, x)
    assert got.measured == pytest.approx(kl.mean(), rel=1e-5)
    assert got.estimate == pytest.approx(half_variance.mean(), rel=1e-5)


def test_only_tokens_with_a_label_count(case, x64):
    base, delta, x, label = case
    x, label = x.reshape(N // 2, 2, WIDTH), label.reshape(N // 2, 2)
    label = np.where(np.arange(N).reshape(label.shape) % 3, label, -100)
    got = measure(base, delta, {"x": x}, label, np.float64)
    kl, half_variance = by_hand(base, delta, x[label != -100])
    assert got.predictions == (label != -100).sum()
    assert got.measured == pytest.approx(kl.mean(), rel=1e-12)
    assert got.estimate == pytest.approx(half_variance.mean(), rel=1e-12)


def test_the_estimate_is_right_for_small_changes_where_the_diagonal_is_not(case, x64):
    """Moving all logits alike changes nothing; the diagonal Fisher cannot see that."""
    base, delta, x, label = case
    small = jax.tree.map(lambda d: 1e-4 * d, delta)
    got = measure(base, small, {"x": x}, label, np.float64)
    assert got.estimate == pytest.approx(got.measured, rel=1e-3)
    alike = {"w": np.repeat(delta["w"][:, :1], CLASSES, 1), "b": np.zeros(CLASSES)}
    got = measure(base, alike, {"x": x}, label, np.float64)
    assert abs(got.measured) < 1e-12 and abs(got.estimate) < 1e-12
    exact = fisher.exact(lambda params, example: apply(params, example))
    diagonal = fisher.estimate(exact, jax.tree.map(jnp.asarray, base), [{"x": jnp.asarray(x)}])
    assert 0.5 * float((diagonal["w"] * alike["w"] ** 2).sum()) > 1e-3


def test_the_policy_limits_kl_but_not_on_tests_that_are_claimed(case):
    base, delta, x, label = case
    base = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), base)
    patch = {"w": patches.Dense(base["w"] + jnp.asarray(delta["w"], jnp.float32))}
    pack = vet.pack("p", {"x": x.astype(np.float32), "label": label})
    kl = by_hand(*case[:3])[0].mean()

    def size(limits, claims=()):
        context = vet.Context(
            patch, base, apply, (pack,), vet.policy(limits), metadata={"claims": list(claims)}
        )
        return vet.size(context)

    assert size({"max_kl": kl * 1.01}).status == "pass"
    assert "max_kl" in size({"max_kl": kl * 0.99}).summary
    assert size({"max_kl": kl * 0.99}, ["p"]).status == "pass"
    assert size({"max_kl": 9.0, "tests": {"p": {"max_kl": kl * 0.99}}}, ["p"]).exit_code == 1
