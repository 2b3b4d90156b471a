"""A batch that is sharded over devices: the same Fisher, and no device gathers another's examples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fishjax import fisher
from fishjax.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick")

T, D, V = 4, 8, 24


def logits(params, example):
    h = jnp.take(params["embed"], example["ids"], axis=0)
    return jnp.tanh(h @ params["up"] + params["bias"][None]).mean(0) @ params["head"]


def loss(params, example):
    return -jax.nn.log_softmax(logits(params, example))[example["y"]]


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "up": (D, 16), "bias": (16,), "head": (16, 3)}
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    batch = {"ids": rng.integers(0, V, (12, T)), "y": rng.integers(0, 3, 12)}
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"embed": P("model"), "up": P(None, "model"), "bias": P("model"), "head": P()}
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
    return params, batch, placed, jax.device_put(batch, NamedSharding(mesh, P("data")))


ESTIMATORS = {
    "empirical": functools.partial(fisher.empirical, loss),
    "exact": functools.partial(fisher.exact, logits),
    "sampled": functools.partial(fisher.sampled, logits, num_samples=2),
}


@pytest.mark.parametrize(
    "kind, method",
    [("empirical", "one_pass"), ("exact", "one_pass"), ("sampled", "one_pass"), ("empirical", "reference")],
)
def test_sharded_is_unsharded(problem, key, kind, method):
    params, batch, placed, divided = problem
    estimator = ESTIMATORS[kind](method=method, chunk_size=4)
    want = fisher.estimate(estimator, params, [batch, batch], key=key)
    got = fisher.estimate(estimator, placed, [divided, divided], key=key)
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12 * float(x.max()))


@pytest.mark.parametrize("method", ["one_pass", "reference"])
def test_no_device_gathers_the_batch(problem, method):
    _, _, placed, divided = problem
    estimator = fisher.empirical(loss, method=method, chunk_size=2)
    update = functools.partial(estimator.update, sharding=divided["ids"].sharding)
    lowered = jax.jit(update).lower(estimator.init(placed), placed, divided)
    text = lowered.compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text
    # One `psum` over the data axis: two devices with the same part of the model add up.
    sums = re.findall(r"= \S.* all-reduce.*\{\{0,4\},\{1,5\},\{2,6\},\{3,7\}\}", text)
    assert 1 <= len(sums) <= 6  # a leaf each


def test_update_sees_the_sharding_of_what_it_is_given(problem):
    params, batch, placed, divided = problem
    estimator = fisher.empirical(loss, chunk_size=4)
    jaxpr = jax.make_jaxpr(lambda s, p: estimator.update(s, p, divided))(estimator.init(placed), placed)
    assert "shard_map" in str(jaxpr)
    jaxpr = jax.make_jaxpr(lambda s, p: estimator.update(s, p, batch))(estimator.init(params), params)
    assert "shard_map" not in str(jaxpr)


def test_batches_that_do_not_fit_the_mesh_are_refused(problem):
    params, batch, _, divided = problem
    estimator, sharding = fisher.empirical(loss), divided["y"].sharding
    odd = jax.tree.map(lambda x: x[:3], batch)
    with pytest.raises(UsageError, match="3 examples do not divide over 2"):
        estimator.update(estimator.init(params), params, odd, sharding=sharding)
    other = jax.device_put(batch["y"], NamedSharding(sharding.mesh, P("model")))
    with pytest.raises(UsageError, match="sharded alike"):
        fisher.estimate(estimator, params, [{**divided, "y": other}])
