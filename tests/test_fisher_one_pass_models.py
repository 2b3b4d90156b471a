"""The one-pass Fisher of models: an encoder, attention of Linen, many classes; float32 and half precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import fisher, models, tree
from tests.fisher_programs import B, D, T, compare, encoder, ways

pytestmark = pytest.mark.usefixtures("quick")


def test_an_encoder_in_float32_agrees_in_norm_and_in_its_mask():
    logits, params, batch = encoder()
    loss = lambda p, e: -jax.nn.log_softmax(logits(p, e))[e["y"]]
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(fisher.estimate(estimator, params, [batch]))])
        for estimator in (
            fisher.empirical(loss, method="reference", chunk_size=1),
            fisher.empirical(loss, method="one_pass", chunk_size=4),
        )
    ]
    assert np.linalg.norm(flat[0] - flat[1]) <= 1e-6 * np.linalg.norm(flat[0])
    kept = [set(np.argsort(-f, kind="stable")[: round(0.005 * f.size)]) for f in flat]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("make", [fisher.exact, fisher.sampled])
def test_exact_and_sampled_go_through_one_pass(make, key):
    logits, params, batch = encoder(layers=1)
    results = [
        fisher.estimate(make(logits, method=m, chunk_size=c), params, [batch], key=key)
        for m, c in (("reference", 2), ("one_pass", 4))
    ]
    total = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(results[0]))
    apart = sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, results), strict=True))
    assert apart <= 1e-12 * total


def test_half_precision_squares_in_float32():
    logits, params, batch = encoder(layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    estimators = [fisher.exact(logits, method=m) for m in ("reference", "one_pass")]
    want, got = (tree.flatten(fisher.estimate(e, params, [batch])) for e in estimators)
    for name in want:
        assert got[name].dtype == jnp.float32
        if name.endswith("k_bias"):  # a softmax is blind to it: its Fisher is 0, and the rest is rounding
            continue
        scale = float(jnp.linalg.norm(want[name]))
        assert float(jnp.linalg.norm(got[name] - want[name])) <= 0.05 * scale + 1e-12, name


def test_attention_of_linen(x64):
    """Normalised keys: without, a softmax is blind to the keys' bias, whose Fisher is only rounding."""
    model = nn.MultiHeadDotProductAttention(2, qkv_features=8, normalize_qk=True, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D))
    loss = lambda p, x: jnp.sum(jnp.sin(model.apply({"params": p}, x)))
    with jax.numpy_dtype_promotion("standard"):  # Linen mixes dtypes of its own
        shapes = jax.eval_shape(model.init, jax.random.key(0), x[0])["params"]
        params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
        assert set(ways(loss, params, x).values()) == {"in place"}
        compare(loss, params, x)


def test_many_classes_of_a_wide_layer_are_exact_in_float32():
    """XLA on a CPU once fused the sum over rows of small leaves into wrong numbers, only at such sizes."""
    model = models.build({"model_type": "fishjax_digits", "hidden_size": 96, "num_hidden_layers": 1})
    params = model.init(jax.random.key(0))
    batch = {"image": jax.random.uniform(jax.random.key(1), (64, 8, 8))}
    totals = {}
    for method in ("one_pass", "reference"):
        estimator = fisher.exact(
            lambda p, x: model.apply(p, {"image": x["image"][None]})[0], method=method, chunk_size=64
        )
        totals[method] = fisher.estimate(estimator, params, [batch])
    for name, want in tree.flatten(totals["reference"]).items():
        if "key.bias" not in name:  # exactly zero but for rounding
            error = jnp.linalg.norm(tree.flatten(totals["one_pass"])[name] - want) / jnp.linalg.norm(want)
            assert error < 1e-5, name
