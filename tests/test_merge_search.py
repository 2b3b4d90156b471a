"""Choosing weights, and RegMean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fishjax import errors, merge
from fishjax.merge import search

MODELS = [{"w": np.array([0.0, 0.0])}, {"w": np.array([1.0, 0.0])}, {"w": np.array([0.0, 9.0])}]
NEAR = lambda p: -float(np.abs(p["w"] - [0.4, 0.0]).sum())
MEAN = lambda w: merge.average(MODELS[: len(w)], weights=w)


def test_greedy_leaves_out_what_hurts_and_never_loses_to_a_parent():
    found = search.greedy(MODELS, select=NEAR)
    assert found.weights == (0.5, 0.5, 0.0)
    np.testing.assert_array_equal(found.params["w"], [0.5, 0.0])
    assert found.trials[0].weights == (1.0, 0.0, 0.0) and len(found.trials) == 5
    assert NEAR(found.params) >= max(NEAR(m) for m in MODELS)
    only = search.greedy(MODELS, select=lambda p: -float(abs(p["w"]).sum()))
    assert only.weights == (1.0, 0.0, 0.0)


def test_grid_has_the_parents_as_its_ends():
    found = search.grid(MEAN, parents=MODELS[:2], select=NEAR, points=6)
    assert [t.weights for t in found.trials] == [(i / 5, (5 - i) / 5) for i in range(6)]
    np.testing.assert_allclose(found.weights, (0.6, 0.4))
    three = search.grid(MEAN, parents=MODELS, select=NEAR, points=5)
    assert len(three.trials) == 15 and all(abs(sum(t.weights) - 1) < 1e-12 for t in three.trials)


def test_dirichlet_is_seeded_and_uniform():
    draw = lambda seed: search.dirichlet(MEAN, parents=MODELS, select=NEAR, trials=400, seed=seed)
    first = draw(1)
    assert first.trials == draw(1).trials != draw(2).trials
    weights = np.array([t.weights for t in first.trials])
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.04)
    np.testing.assert_allclose(weights.var(0), 1 / 18, atol=0.01)
    assert max(t.score for t in first.trials) == NEAR(first.params)


def test_reports_stand_side_by_side_and_do_not_select():
    reports = {"first axis": lambda p: float(p["w"][0]), "second": lambda p: float(p["w"][1])}
    found = search.grid(MEAN, parents=MODELS[:2], select=NEAR, points=3, reports=reports)
    assert found.reports["first axis"] == {"merged": 0.5, "parent 0": 0.0, "parent 1": 1.0}
    with pytest.raises(errors.UsageError, match="the score that selects"):
        search.uniform(MODELS, select=NEAR, reports={"test": NEAR})


def test_nothing_to_choose_among():
    more = {"parents": [], "select": NEAR}
    for search_it in (
        lambda: search.uniform([], select=NEAR),
        lambda: search.greedy([], select=NEAR),
        lambda: search.grid(MEAN, **more),
        lambda: search.dirichlet(MEAN, **more),
        lambda: search.few_shot(MEAN, parents=[], score=lambda p, b: 0.0, examples={"x": np.arange(8)}),
    ):
        with pytest.raises(errors.UsageError, match="must hold at least one model; got none"):
            search_it()


def test_merges_that_do_nothing_are_found():
    same = search.grid(lambda w: MODELS[1], parents=MODELS[:2], select=NEAR, points=3, probe=lambda p: p["w"])
    assert any("all 3 trials score" in w for w in same.warnings)
    stuck = search.among(
        lambda w: MODELS[1], [[0.5, 0.5]], parents=MODELS[:2], select=NEAR, probe=lambda p: p["w"]
    )
    assert stuck.warnings == ["the merge with weights (0.5, 0.5) gives the outputs of parent 1"]
    fine = search.uniform(MODELS, select=NEAR, probe=lambda p: p["w"])
    assert fine.warnings == []


def test_merges_that_are_not_what_was_asked_are_found():
    look = {"parents": MODELS[:2], "select": NEAR, "points": 3, "probe": lambda p: p["w"]}
    assert search.grid(MEAN, **look).warnings == []
    swapped = search.grid(lambda w: MEAN(w[::-1]), **look)
    assert swapped.warnings == [
        "the merge with weights (0.0, 1.0) does not give the outputs of parent 1",
        "the merge with weights (1.0, 0.0) does not give the outputs of parent 0",
    ]


# Examples, and weights by few of them


def _rows(batch):
    return {(*x, int(y)) for x, y in zip(batch["x"], batch["y"], strict=True)}


def test_a_split_depends_on_the_examples_alone():
    rng = np.random.default_rng(0)
    rows = {"x": rng.integers(0, 9, (60, 3)), "y": rng.integers(0, 2, 60)}
    rows = jax.tree.map(lambda x: np.concatenate([x, x[:20]]), rows)  # some twice
    held_in, held_out = search.split(rows, held_out=0.25)
    assert not _rows(held_in) & _rows(held_out) and _rows(held_in) | _rows(held_out) == _rows(rows)
    assert held_in["y"].size + held_out["y"].size == 80 and 19 <= held_out["y"].size <= 20
    order = rng.permutation(80)
    other = search.split(jax.tree.map(lambda x: x[order], rows), held_out=0.25)
    assert (
        _rows(other.held_out) == _rows(held_out) != _rows(search.split(rows, held_out=0.25, seed=1).held_out)
    )
    places = [rows["x"].tolist().index(x) for x in held_in["x"].tolist()]
    assert places[:9] == sorted(places[:9])  # in the order of the examples
    assert isinstance(search.split({"x": jnp.arange(4)}).held_in["x"], jax.Array)


def test_splits_are_fair():
    sides = [set(search.split({"x": np.arange(40)}, seed=i).held_out["x"].tolist()) for i in range(300)]
    shares = np.array([sum(i in side for side in sides) for i in range(40)]) / 300
    assert abs(shares - 0.5).max() < 4 * np.sqrt(0.25 / 300)


@pytest.mark.parametrize("target", [(0.2, 0.5, 0.3), (0.8, 0.2, 0.0), (-1.0, 0.9, 0.4)])
def test_few_shot_finds_the_nearest_point_of_the_simplex(target):
    rng = np.random.default_rng(0)
    corners = [{"w": row} for row in np.eye(3)]  # the merged parameters are the weights
    rows = {"x": np.array(target) + 0.05 * rng.standard_normal((12, 3))}
    near = lambda p, batch: -float(((batch["x"] - p["w"]) ** 2).sum(-1).mean())
    found = search.few_shot(
        lambda w: merge.average(corners, weights=w), parents=corners, score=near, examples=rows
    )
    parts = search.split(rows)
    mean = parts.held_in["x"].mean(0)
    cuts = np.sort(mean)[::-1]  # the projection onto the simplex, in closed form
    shift = max((cuts[: k + 1].sum() - 1) / (k + 1) for k in range(3))
    np.testing.assert_allclose(found.weights, np.maximum(mean - shift, 0), atol=1 / 64)
    assert len(found.trials) <= 100 and abs(sum(found.weights) - 1) < 1e-12
    assert max(t.score for t in found.trials) == found.reports["held in"]["merged"]
    for name, part in zip(("held in", "held out"), parts, strict=True):
        want = {"merged": found.params, **{f"parent {i}": p for i, p in enumerate(corners)}}
        assert found.reports[name] == {n: near(p, part) for n, p in want.items()}


def test_few_shot_never_looks_at_what_it_reports_on():
    rows, seen = {"x": np.arange(10.0)}, []

    def score(params, batch):
        seen.append(frozenset(batch["x"]))
        return NEAR(params)

    found = search.few_shot(MEAN, parents=MODELS, score=score, examples=rows, trials=9, held_out=0.3)
    parts = search.split(rows, held_out=0.3)
    assert len(found.trials) == 9 and set(seen[:9]) == {frozenset(parts.held_in["x"])}
    assert set(seen[9:]) == {frozenset(part["x"]) for part in parts}


def test_few_shot_warns_where_the_weights_fit_no_other_examples():
    rows = {"x": np.arange(8.0)}
    held_in = set(search.split(rows).held_in["x"])
    own = lambda p, batch: NEAR(p) if set(batch["x"]) == held_in else float(p["w"][1])
    found = search.few_shot(MEAN, parents=MODELS, score=own, examples=rows)
    (warning,) = found.warnings
    assert warning.startswith("held out, parent 2 scores 9 and the merge 0")
    assert search.few_shot(MEAN, parents=MODELS, score=lambda p, _: NEAR(p), examples=rows).warnings == []


def test_bad_examples():
    rows = {"x": np.arange(4.0)}
    with pytest.raises(errors.UsageError, match=r"share in \(0, 1\); got 1"):
        search.split(rows, held_out=1)
    with pytest.raises(errors.UsageError, match=r"one leading axis; got `x` .4., `y` .3."):
        search.split(rows | {"y": np.arange(3)})
    with pytest.raises(errors.UsageError, match="one leading axis"):
        search.split({"x": np.float32(1)})
    with pytest.raises(errors.UsageError, match="of 4 examples"):
        search.split({"x": np.zeros(4)})
    with pytest.raises(errors.UsageError, match=r"at least 4, .* got 3"):
        search.few_shot(MEAN, parents=MODELS, score=lambda p, b: 0.0, examples=rows, trials=3)


def test_bad_searches():
    with pytest.raises(errors.UsageError, match="NaN"):
        search.uniform(MODELS, select=lambda p: float("nan"))
    with pytest.raises(errors.UsageError, match="at least one"):
        search.among(MEAN, [], parents=MODELS, select=NEAR)
    with pytest.raises(errors.UsageError, match="got 2"):
        search.among(MEAN, [[1, 2]], parents=MODELS, select=NEAR)
    with pytest.raises(errors.UsageError, match="at least 2"):
        search.grid(MEAN, parents=MODELS, select=NEAR, points=1)


# RegMean


def _regression(seed, n=300, size=6, out=4):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, size)) @ rng.standard_normal((size, size)), rng.standard_normal(
        (size, out)
    )


@pytest.mark.parametrize("axis", [0, -1])
def test_regmean_is_the_least_squares_fit_to_everybodys_outputs(axis):
    data = [_regression(i) for i in range(3)]
    turn = (lambda w: w) if axis == 0 else np.transpose
    models = [{"w": turn(w), "b": np.full(4, float(i))} for i, (_, w) in enumerate(data)]
    merged = merge.regmean(models, grams=[{"w": x.T @ x} for x, _ in data], alpha=1.0, axis=axis)
    inputs, outputs = np.concatenate([x for x, _ in data]), np.concatenate([x @ w for x, w in data])
    want = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    np.testing.assert_allclose(turn(merged["w"]), want, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(merged["b"], np.ones(4))
    diagonal = merge.regmean(models, grams=[{"w": x.T @ x} for x, _ in data], alpha=0.0, axis=axis)
    fishers = [{"w": turn(np.repeat((x**2).sum(0)[:, None], 4, 1)), "b": np.ones(4)} for x, _ in data]
    np.testing.assert_allclose(diagonal["w"], merge.fisher(models, fishers=fishers)["w"], rtol=1e-9)


def test_regmean_of_inputs_that_nobody_saw_is_the_average():
    models = [{"w": np.random.default_rng(i).standard_normal((4, 5)).astype(np.float32)} for i in range(2)]
    merged = merge.regmean(models, grams=[{"w": np.zeros((5, 5))}] * 2)
    np.testing.assert_allclose(merged["w"], merge.average(models)["w"], rtol=1e-6)
    as_jax = [{"w": jnp.asarray(m["w"])} for m in models]
    assert isinstance(merge.regmean(as_jax, grams=[{"w": np.eye(5)}] * 2)["w"], jnp.ndarray)


def test_bad_grams():
    models = [{"w": np.ones((4, 5))}] * 2
    for grams, wrong in (
        ([{"w": np.eye(5)}], "got 1"),
        ([{"w": np.eye(4)}] * 2, r"symmetric \[5, 5\]"),
        ([{"w": np.triu(np.ones((5, 5)))}] * 2, "symmetric"),
        ([{"v": np.eye(5)}] * 2, "`v`"),
        ([{"w": np.eye(5)}, {}], "other weights"),
    ):
        with pytest.raises(errors.FishjaxError, match=wrong):
            merge.regmean(models, grams=grams)


def test_grams_are_those_of_a_models_own_activations():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 6, name="embed")(ids)
            x = nn.relu(nn.Dense(8, name="first")(x))
            return nn.Dense(3, name="second")(x)

    ids = [jnp.arange(10).reshape(2, 5), jnp.arange(5).reshape(1, 5)]
    params = Net().init(jax.random.key(0), ids[0])["params"]
    apply = lambda p, batch: Net().apply({"params": p}, batch)
    found = merge.grams(apply, params, ids)
    assert set(found) == {"first.kernel", "second.kernel"}
    rows = np.concatenate(
        [np.asarray(params["embed"]["embedding"], np.float64)[i].reshape(-1, 6) for i in ids]
    )
    np.testing.assert_allclose(found["first.kernel"], rows.T @ rows, rtol=1e-5, atol=1e-6)
    hidden = np.maximum(rows @ np.asarray(params["first"]["kernel"]) + np.asarray(params["first"]["bias"]), 0)
    np.testing.assert_allclose(found["second.kernel"], hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    assert set(merge.grams(apply, params, ids, targets="second")) == {"second.kernel"}


def test_grams_see_transposed_weights_and_refuse_what_they_cannot_see():
    w, x = jnp.arange(12.0).reshape(4, 3), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(merge.grams(lambda p, x: x @ p["w"].T, {"w": w}, [x])["w"], x.T @ x)
    np.testing.assert_allclose(
        merge.grams(jax.jit(lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"])), {"w": w}, [x])["w"], x.T @ x
    )

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]

    with pytest.raises(errors.UsageError, match="inside a scan"):
        merge.grams(scanned, {"w": jnp.ones((2, 3, 3))}, [x])
    with pytest.raises(errors.UsageError, match="at least one batch"):
        merge.grams(scanned, {"w": jnp.ones((2, 3, 3))}, [])
