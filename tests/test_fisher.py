"""Estimators of the Fisher against closed forms and single-example loops."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import fisher, models
from fishjax.errors import StructureError, UsageError


def mlp(params, x):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return h @ params["w2"]


def tokens(params, x):
    return jax.vmap(mlp, (None, 0))(params, x)


def loss(params, example):
    return -jax.nn.log_softmax(mlp(params, example["x"]))[example["y"]]


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.array(rng.normal(size=(5, 4))),
        "b1": jnp.array(rng.normal(size=4)),
        "w2": jnp.array(rng.normal(size=(4, 3))),
    }
    batch = {"x": jnp.array(rng.normal(size=(7, 5))), "y": jnp.array(rng.integers(0, 3, 7))}
    return params, batch


def examples(batch):
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(jax.tree.leaves(batch)[0]))]


def loop(params, batch, gradients):
    """The oracle: one example at a time, the mean of sum_k gradient_k^2."""
    total = jax.tree.map(np.zeros_like, params)
    for example in examples(batch):
        for g in gradients(params, example):
            total = jax.tree.map(lambda t, g: t + np.square(np.asarray(g)), total, g)
    return jax.tree.map(lambda t: t / len(examples(batch)), total)


def expected(params, example, logits_fn=mlp):
    """sqrt(p_c) d log p_c, for every class c."""
    p = jax.nn.softmax(logits_fn(params, example["x"]))
    for c in range(p.size):
        g = jax.grad(lambda q, c=c: jax.nn.log_softmax(logits_fn(q, example["x"]))[c])(params)
        yield jax.tree.map(lambda g, c=c: jnp.sqrt(p[c]) * g, g)


def same(a, b, tolerance=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(np.abs(y).max(), 1e-300))


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7, 50])
def test_empirical_is_the_mean_of_single_squared_gradients(problem, chunk_size):
    params, batch = problem
    got = fisher.estimate(fisher.empirical(loss, method="reference", chunk_size=chunk_size), params, [batch])
    same(got, loop(params, batch, lambda p, e: [jax.grad(loss)(p, e)]))


def test_logistic_regression_has_its_closed_form(x64):
    x = np.random.default_rng(1).normal(size=(6, 4))
    w = np.random.default_rng(2).normal(size=4)
    p = 1 / (1 + np.exp(-x @ w))
    logit = lambda params, x: (x @ params)[None]
    got = fisher.estimate(fisher.exact(logit, likelihood="bernoulli"), jnp.array(w), [x])
    same(got, np.mean(x**2 * (p * (1 - p))[:, None], axis=0))


def test_gaussian_is_the_squared_jacobian(problem):
    params, batch = problem
    got = fisher.estimate(fisher.exact(mlp, likelihood="gaussian"), params, [batch["x"]])
    rows = lambda p, x: [jax.grad(lambda q, c=c: mlp(q, x)[c])(p) for c in range(3)]
    same(got, loop(params, batch["x"], rows))


def test_exact_is_the_expectation_over_classes(problem):
    params, batch = problem
    got = fisher.estimate(fisher.exact(lambda p, e: mlp(p, e["x"])), params, [batch])
    same(got, loop(params, batch, expected))


def yes_or_no(params, example):
    """sqrt(p_c (1 - p_c)) times the gradient of logit c, for every output c."""
    for c in range(3):
        z, g = jax.value_and_grad(lambda q, c=c: mlp(q, example["x"])[c])(params)
        p = jax.nn.sigmoid(z)
        yield jax.tree.map(lambda g, p=p: jnp.sqrt(p * (1 - p)) * g, g)


@pytest.mark.parametrize("likelihood, rows", [("categorical", expected), ("bernoulli", yes_or_no)])
def test_exact_counts_every_token_of_the_mask(problem, likelihood, rows):
    params, _ = problem
    x = jnp.array(np.random.default_rng(3).normal(size=(4, 6, 5)))  # [B, T, 5]
    keep = jnp.arange(6) < 4
    estimator = fisher.exact(tokens, likelihood=likelihood, token_mask=lambda _: keep)
    flat = {"x": x[:, :4].reshape(-1, 5)}
    want = jax.tree.map(lambda f: 4 * f, loop(params, flat, rows))  # 4 tokens an example
    same(fisher.estimate(estimator, params, [x]), want)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_sampled_tends_to_exact(problem, kind):
    params, batch = problem
    x = batch["x"][:2]
    want = fisher.estimate(fisher.exact(mlp, likelihood=kind), params, [x])
    draw = fisher.sampled(mlp, likelihood=kind, num_samples=20_000)
    got = fisher.estimate(draw, params, [x], key=jax.random.key(0))
    same(got, want, 0.05)


def test_sampled_tokens_tend_to_exact(problem):
    params, _ = problem
    x = jnp.array(np.random.default_rng(3).normal(size=(1, 3, 5)))
    mask = {"token_mask": lambda e: jnp.array([True, False, True])}
    want = fisher.estimate(fisher.exact(tokens, **mask), params, [x])
    draw = fisher.sampled(tokens, num_samples=20_000, **mask)
    same(fisher.estimate(draw, params, [x], key=jax.random.key(0)), want, 0.05)


@pytest.mark.parametrize("make", [fisher.exact, fisher.sampled])
def test_splitting_the_stream_changes_nothing(problem, make, key):
    params, batch = problem
    estimator = make(lambda p, e: mlp(p, e["x"]), chunk_size=2)
    parts = [jax.tree.map(lambda x: x[:3], batch), jax.tree.map(lambda x: x[3:], batch)]
    same(
        fisher.estimate(estimator, params, iter(parts), key=key),
        fisher.estimate(estimator, params, [batch], key=key),
        1e-13,
    )


@pytest.mark.parametrize("gap", [0.0, 1.0, 30.0, 200.0])
def test_saturated_probabilities_stay_finite_and_right(gap):
    """In float32, p = 1 and p = 0; the oracle is float64."""
    x = np.array([[0.0, 1.0, -1.0, 2.0]], np.float32) * np.float32(gap)
    got = fisher.estimate(fisher.exact(lambda w, x: w * x), jnp.ones(4), [x])
    logits = x[0].astype(np.float64)
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    others = np.array([np.delete(p, c).sum() for c in range(4)])  # 1 - p, without the cancellation
    want = p * others * logits**2
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-37)
    got = fisher.estimate(fisher.exact(lambda w, x: w * x, likelihood="bernoulli"), jnp.ones(4), [x])
    want = logits**2 / (1 + np.exp(-logits)) / (1 + np.exp(logits))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("method", ["one_pass", "reference"])
def test_classes_share_one_forward_and_are_scanned(method):
    def program(classes, **options):
        params = {"w1": jnp.zeros((5, 4)), "b1": jnp.zeros(4), "w2": jnp.zeros((4, classes))}
        estimator = fisher.exact(mlp, method=method, chunk_size=2, **options)
        return str(jax.make_jaxpr(estimator.update)(estimator.init(params), params, jnp.zeros((2, 5))))

    program(2, max_rows=1)  # C - 1 backwards
    few, many = program(9), program(33)
    assert few.count(" tanh ") == many.count(" tanh ") == 1
    assert few.count(" = ") == many.count(" = ")  # equations


def test_a_class_at_minus_infinity_has_no_part():
    mask = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
    got = fisher.estimate(fisher.exact(lambda w, x: w * x + mask), jnp.ones(4), [jnp.ones((1, 4))])
    np.testing.assert_allclose(got, [0.25, 0, 0.25, 0], atol=1e-7)


def test_half_precision_accumulates_in_float32(problem):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem[0])
    x = problem[1]["x"].astype(jnp.bfloat16)
    for estimator in (
        fisher.exact(mlp),
        fisher.empirical(lambda p, x: jnp.sum(mlp(p, x))),
        fisher.sampled(mlp, likelihood="gaussian"),
    ):
        got = fisher.estimate(estimator, params, [x], key=jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
        assert all(bool(jnp.all(leaf >= 0)) for leaf in jax.tree.leaves(got))


def test_the_state_continues_bit_for_bit_from_orbax(problem, tmp_path, key):
    import orbax.checkpoint as ocp

    params, batch = problem
    estimator = fisher.sampled(lambda p, e: mlp(p, e["x"]))
    update = jax.jit(estimator.update)
    first = update(estimator.init(params), params, batch, key)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", first)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(estimator.init, params))
    assert isinstance(restored, fisher.FisherState)
    through = estimator.finalize(update(first, params, batch, key))
    resumed = fisher.estimate(estimator, params, [batch], key=key, state=restored)
    jax.tree.map(np.testing.assert_array_equal, through, resumed)
    assert restored.count == 7  # it is copied, not donated
    with pytest.raises(StructureError, match="`w2`"):
        fisher.estimate(estimator, {**params, "w2": params["w1"]}, [batch], key=key, state=restored)


def test_the_accumulator_is_donated(problem):
    params, batch = problem
    estimator = fisher.empirical(loss)
    state = estimator.init(params)
    jax.jit(estimator.update, donate_argnums=0)(state, params, batch)
    assert state.total["w1"].is_deleted()


def test_legacy_sqrt_sum_is_what_it_says(problem):
    """Two classes, one example: the Fisher times (sqrt(p1) - sqrt(p0))^2."""
    params, batch = problem
    two = lambda p, x: mlp(p, x)[:2]
    x = batch["x"][:1]
    p = jax.nn.softmax(two(params, x[0]))
    factor = (jnp.sqrt(p[1]) - jnp.sqrt(p[0])) ** 2
    want = jax.tree.map(lambda f: f * factor, fisher.estimate(fisher.exact(two), params, [x]))
    same(fisher.estimate(fisher.legacy_sqrt_sum(two), params, [x]), want)


def test_legacy_argmax_squares_the_gradient_of_a_batch(problem):
    params, batch = problem
    best = lambda p, x: -jnp.max(jax.nn.log_softmax(mlp(p, x)))
    single = jax.jit(jax.vmap(jax.grad(best), (None, 0)))(params, batch["x"])
    parts = slice(0, 3), slice(3, 7)
    want = jax.tree.map(lambda g: sum(g[part].mean(0) ** 2 for part in parts) / 2, single)
    same(fisher.estimate(fisher.legacy_argmax(mlp), params, [batch["x"][part] for part in parts]), want)


@pytest.mark.slow
def test_a_seq2seq_fisher_is_that_of_unpadded_labels(x64):
    config = json.loads((pathlib.Path(__file__).parent / "fixtures/models/t5_v1_0/config.json").read_text())
    model = models.build(config | {"num_layers": 1, "num_decoder_layers": 1})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2), shapes)
    rows = [{"input_ids": [3, 1, 4], "labels": [5, 9, 2]}, {"input_ids": [2, 7], "labels": [8]}]
    padded = {
        "input_ids": np.array([[3, 1, 4], [2, 7, 0]], np.int32),
        "attention_mask": np.array([[1, 1, 1], [1, 1, 0]], np.int32),
        "labels": np.array([[5, 9, 2], [8, -100, -100]], np.int32),
    }
    loss_of = models.example_loss(model)
    gradient = jax.jit(jax.grad(loss_of))
    found = [gradient(params, {n: np.array(x, np.int32) for n, x in row.items()}) for row in rows]
    want = jax.tree.map(lambda a, b: (np.square(a) + np.square(b)) / 2, *found)
    same(fisher.estimate(fisher.empirical(loss_of), params, [padded]), want)


def nan_in_w2(params, example):
    return jnp.sum(params["w1"]) + jnp.sum(jnp.sqrt(params["w2"] * 0))


@pytest.mark.parametrize(
    "run, said",
    [
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, b), "one batch"),
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, b["x"]), "one batch"),
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, []), "empty"),
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, iter(())), "empty"),
        (
            lambda p, b: fisher.estimate(fisher.empirical(lambda p, e: mlp(p, e["x"])), p, [b]),
            r"float64\[3\]",
        ),
        (
            lambda p, b: fisher.estimate(fisher.empirical(lambda p, e: e["y"]), p, [b]),
            "floating-point scalar",
        ),
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, [{**b, "x": b["x"][:3]}]), "leading size"),
        (
            lambda p, b: fisher.estimate(
                fisher.empirical(loss), p, [{**b, "x": b["x"][:0], "y": b["y"][:0]}]
            ),
            "at least 1",
        ),
        (lambda p, b: fisher.estimate(fisher.empirical(loss), p, [{**b, "n": 3.0}]), "`n`"),
        (
            lambda p, b: fisher.estimate(fisher.empirical(loss), {**p, "ids": jnp.arange(3)}, [b]),
            "`ids` is int",
        ),
        (lambda p, b: fisher.estimate(fisher.empirical(nan_in_w2), p, [b]), "`w2` are not finite"),
        (lambda p, b: fisher.estimate(fisher.sampled(mlp), p, [b["x"]]), "pass `key"),
        (
            lambda p, b: fisher.estimate(fisher.sampled(tokens), p, [b["x"][:, None]], key=jax.random.key(0)),
            "token_mask",
        ),
        (lambda p, b: fisher.estimate(fisher.exact(mlp, token_mask=lambda x: x), p, [b["x"]]), r"\[T, V\]"),
        (
            lambda p, b: fisher.estimate(
                fisher.exact(tokens, token_mask=lambda x: jnp.zeros(2, bool)), p, [jnp.ones((4, 2, 5))]
            ),
            "selects no token in 4 of 4",
        ),
        (
            lambda p, b: fisher.estimate(
                fisher.exact(tokens, token_mask=lambda x: jnp.ones(3, bool)), p, [jnp.ones((4, 2, 5))]
            ),
            "one value a token",
        ),
        (lambda p, b: fisher.estimate(fisher.exact(mlp, max_rows=1), p, [b["x"]]), "use `fisher.sampled`"),
        (lambda p, b: fisher.estimate(fisher.exact(lambda p, x: mlp(p, x)[:1]), p, [b["x"]]), "bernoulli"),
        (lambda p, b: fisher.empirical(loss, method="fast"), "`method` must be one of"),
        (lambda p, b: fisher.empirical(loss, chunk_size=0), "`chunk_size`"),
        (lambda p, b: fisher.sampled(mlp, likelihood="poisson"), "`likelihood` must be one of"),
        (lambda p, b: fisher.sampled(mlp, num_samples=0), "`num_samples`"),
        (lambda p, b: fisher.empirical(loss).finalize(fisher.empirical(loss).init(p)), "no example"),
    ],
)
def test_bad_input_says_what_to_do(problem, run, said):
    with pytest.raises(UsageError, match=said):
        run(*problem)


def test_parameters_that_were_put_on_a_device_compile_once(caplog):
    """As those of a checkpoint are: a first state that lay nowhere would compile `update` again."""
    loss = lambda params, x: jnp.sum(jnp.tanh(params["w"] * x))
    params = jax.device_put({"w": jnp.ones(3)}, jax.devices()[0])
    with jax.log_compiles():
        fisher.estimate(fisher.empirical(loss), params, [jnp.ones((2, 3))] * 3)
    assert caplog.text.count("Compiling jit(update)") == 1
