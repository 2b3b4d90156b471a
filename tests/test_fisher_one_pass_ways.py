"""The ways of the one-pass Fisher: what explain says, what auto takes, loops, branches, and memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fishjax import fisher
from fishjax.fisher import _auto, _scores
from tests.fisher_programs import QUICK, B, T, compare, encoder, set_limits, ways

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def limits(monkeypatch):
    return functools.partial(set_limits, monkeypatch)


def test_explain_names_the_way_of_each_leaf(limits):
    logits, params, batch = encoder(layers=1)
    example = jax.tree.map(lambda x: x[0], batch)
    loss = lambda p, e: -jax.nn.log_softmax(logits(p, e))[e["y"]]
    said = fisher.explain(loss, params, example)
    table = [line.split() for line in said.splitlines()]
    assert ["token", "[500,", "32]", "in", "place", "rows"] in table
    assert ["layer0.q", "[32,", "2,", "16]", "in", "place", "dot_general"] in table
    assert "100.0 % in place" in said and "one_pass" in said.splitlines()[-1]

    def tied(p, e):
        return loss(p, e) + jnp.sum(jnp.sin(jnp.take(p["token"], e["ids"], axis=0) @ p["token"].T))

    def way_of_token():
        (line,) = (x for x in fisher.explain(tied, params, example).splitlines() if x.startswith("token"))
        return line.split()[3:]

    shared = ["shared:", "rows,", "dot_general"]
    assert way_of_token() == ["copies", *shared]
    limits(few=0)  # as if it were large
    assert way_of_token() == ["hub", *shared]


def test_explain_on_linen_and_nnx():
    model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), jnp.ones(3))["params"]
    said = fisher.explain(lambda p, x: model.apply({"params": p}, x).sum(), params, jnp.ones(3))
    assert "layers_0.kernel" in said and "in place  dot_general" in said

    graph, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    loss = lambda s, x: jnp.sum(nnx.merge(graph, s)(x) ** 2)
    assert "kernel  [3, 2]  in place  dot_general" in fisher.explain(loss, state, jnp.ones(3))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    got = fisher.estimate(fisher.empirical(loss, method="one_pass"), state, [x])
    want = fisher.estimate(fisher.empirical(loss, method="reference"), state, [x])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_auto_takes_the_reference_way_where_no_rule_helps(limits):
    limits(copied=0, few=2**14)
    shared = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]) + jnp.cos(x @ p["w"]))
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(2)}
    said = fisher.explain(shared, params, jnp.ones((5, 4)))
    assert said.splitlines()[-1].startswith("18 parameters: 11.1 % in place, 88.9 % reference. reference")
    limits()
    assert (
        fisher.explain(shared, params, jnp.ones((5, 4)))
        .splitlines()[-1]
        .split(". ")[1]
        .startswith("one_pass")
    )


def test_auto_sizes_the_micro_batch_by_parameters_rows_and_memory():
    logits, params, batch = encoder(vocabulary=20_000)
    small = {**params, "token": params["token"][:500]}
    example = jax.tree.map(lambda x: x[0], batch)

    def size(params, of, memory=None):
        return _auto.choose(of, params, example, "auto", None, memory).chunk_size

    two = _scores.of_exact(lambda p, e: logits(p, e)[:2], "categorical", None, 99)
    three = _scores.of_exact(logits, "categorical", None, 99)
    assert size(params, two) > size(small, two) == 2 * size(small, three)
    assert [size(small, two, memory=m) for m in (1, 2**20, 2**21)] == [
        1,
        *(size(small, two, 2**20) * n for n in (1, 2)),
    ]


def test_a_use_that_is_not_reached_keeps_the_total():
    """The squares of `w` start from the total; a branch not taken must not lose it."""

    def loss(p, x):
        return jnp.sum(x) * p["gate"] + lax.cond(
            p["gate"] > 0, lambda w: jnp.sum(x @ w), lambda w: 0.0, p["w"]
        )

    estimator = fisher.empirical(loss, method="one_pass", chunk_size=2)
    params = {"gate": jnp.float32(1), "w": jnp.ones((3, 2))}
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    update = jax.jit(estimator.update, compiler_options=QUICK)
    reached = update(estimator.init(params), params, x)
    assert bool(jnp.all(reached.total["w"] > 0))
    after = update(reached, {**params, "gate": jnp.float32(-1)}, x)
    np.testing.assert_array_equal(after.total["w"], reached.total["w"])


def test_a_while_loop_goes_the_reference_way():
    def loss(p, x):
        stop = lax.while_loop(lambda w: w.sum() < 0, lambda w: w + 1, p["w"])
        return jnp.sum(x @ p["w"]) + lax.stop_gradient(stop).sum() + jnp.sum(x @ p["v"])

    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    x = np.random.default_rng(0).normal(size=(B, T, 4)).astype(np.float32)
    assert ways(loss, params, x) == {"w": "reference", "v": "in place"}
    compare(loss, params, x, 1e-6)


def test_memory_bounds_the_micro_batch_and_does_not_grow_with_examples():
    logits, params, batch = encoder()
    loss = lambda p, e: -jax.nn.log_softmax(logits(p, e))[e["y"]]
    many = jax.tree.map(lambda x: np.tile(x, (20, *[1] * (x.ndim - 1))), batch)

    def temporary(batch, **options):
        estimator = fisher.empirical(loss, method="one_pass", **options)
        state = jax.eval_shape(estimator.init, params)
        compiled = jax.jit(estimator.update, donate_argnums=0).lower(state, params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small = temporary(many, memory=2**20)
    assert small <= 1.2 * temporary(batch, memory=2**20)
    assert small < temporary(many) / 4
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    assert small <= 2 * held + 2**21
