"""Merging trees: average and Fisher against closed forms and float64, names, weights, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fishjax import errors, merge

SHAPES = {"body.kernel": (16, 24), "body.bias": (24,), "head.kernel": (24, 8), "norm": ()}


def _tree(seed, dtype=np.float32, xp=np, positive=False):
    rng = np.random.default_rng(seed)
    leaf = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    if positive:
        leaf = {n: x**2 for n, x in leaf.items()}
    x = {n: xp.asarray(v).astype(dtype) for n, v in leaf.items()}
    return {
        "body": {"kernel": x["body.kernel"], "bias": x["body.bias"]},
        "head": {"kernel": x["head.kernel"]},
        "norm": x["norm"],
    }


def _flat(params):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]


MODELS = [_tree(i) for i in range(3)]
FISHERS = [_tree(10 + i, positive=True) for i in range(3)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5], [2.0, -0.5, 0.0]])
def test_average_is_the_weighted_mean(weights):
    w = np.ones(3) if weights is None else np.array(weights)
    merged = merge.average(MODELS, weights=weights)
    for got, *leaves in zip(_flat(merged), *map(_flat, MODELS), strict=True):
        want = sum(wi * x for wi, x in zip(w, leaves, strict=True)) / w.sum()
        terms = sum(abs(wi * x) for wi, x in zip(w, leaves, strict=True)) / abs(w.sum())
        assert np.all(abs(got - want) <= 8 * 2.0**-24 * terms)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_copies_of_a_model_merge_to_that_model(n):
    for merged in (merge.average([MODELS[0]] * n), merge.fisher([MODELS[0]] * n, fishers=[FISHERS[0]] * n)):
        for got, want in zip(_flat(merged), _flat(MODELS[0]), strict=True):
            np.testing.assert_allclose(got, want, rtol=4e-7)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("favor", [None, 0, 2])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_fisher_is_the_formula(weights, favor, normalize):
    floor = 0.3  # so that it matters for many entries
    merged = merge.fisher(
        MODELS, fishers=FISHERS, weights=weights, floor=floor, normalize=normalize, favor=favor
    )
    w = np.ones(3) if weights is None else np.array(weights)
    if normalize:
        w = w / [np.sqrt(sum((f**2).sum() for f in _flat(tree))) for tree in FISHERS]
    for got, *leaves in zip(_flat(merged), *map(_flat, MODELS), *map(_flat, FISHERS), strict=True):
        thetas, fs = leaves[:3], leaves[3:]
        d = [
            wi * (np.maximum(f, floor) if favor in (None, i) else f)
            for i, (wi, f) in enumerate(zip(w, fs, strict=True))
        ]
        want = sum(a * x for a, x in zip(d, thetas, strict=True)) / sum(d)
        terms = sum(a * abs(x) for a, x in zip(d, thetas, strict=True)) / sum(d)
        assert np.all(abs(got - want) <= 8 * 2.0**-24 * terms)


def test_a_favored_model_holds_where_nobody_knows_anything():
    none = jax.tree.map(np.zeros_like, FISHERS[0])
    merged = merge.fisher(MODELS, fishers=[none] * 3, favor=1)
    jax.tree.map(np.testing.assert_array_equal, merged, MODELS[1])
    assert not np.allclose(
        merge.fisher(MODELS, fishers=[none] * 3)["norm"], MODELS[1]["norm"]
    )  # floored: the mean


@pytest.mark.parametrize("favor, winner", [(None, 0), (0, 0), (2, 2)])
def test_a_zero_denominator_takes_the_favored_model_and_is_never_nan(favor, winner):
    none = jax.tree.map(np.zeros_like, FISHERS[0])
    merged = merge.fisher(MODELS, fishers=[none] * 3, floor=0, favor=favor)
    jax.tree.map(np.testing.assert_array_equal, merged, MODELS[winner])
    # the last point of the original search: the target's weight is 0, the donor has seen nothing
    merged = merge.fisher(MODELS[:2], fishers=[none] * 2, weights=[0, 1], favor=0)
    jax.tree.map(np.testing.assert_array_equal, merged, MODELS[0])


def test_kinds_of_trees_and_dtypes():
    for dtype in (jnp.bfloat16, np.float16, np.float64):
        merged = merge.average([_tree(i, dtype) for i in range(3)])
        assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(dtype)}
        assert all(isinstance(x, (np.ndarray, np.generic)) for x in jax.tree.leaves(merged))
    graph, _ = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    states = [nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(i)))[1] for i in range(2)]
    merged = merge.average(states)
    assert jax.tree.structure(merged) == jax.tree.structure(states[0])
    want = (states[0]["kernel"][...] + states[1]["kernel"][...]) / 2
    np.testing.assert_array_equal(nnx.merge(graph, merged).kernel[...], want)


def test_bfloat16_is_rounded_once():
    weights = [0.31416, 0.1, 0.27183, 0.25, 0.14142]  # no short decimals: their exact sums often are ties
    rng = np.random.default_rng(0)
    models = [{"w": rng.standard_normal(200_000).astype(jnp.bfloat16)} for _ in weights]
    got = merge.average(models, weights=weights)["w"]
    exact = sum(w * m["w"].astype(np.float64) for w, m in zip(weights, models, strict=True)) / sum(weights)
    assert (got == exact.astype(jnp.bfloat16)).mean() >= 0.999
    spacing = 2.0 ** (np.floor(np.log2(abs(exact))) - 7)
    assert np.all(abs(got.astype(np.float64) - exact) <= spacing / 2 + 2.0**-20)


def test_jit_and_gradients():
    models, fishers = jax.tree.map(jnp.asarray, (MODELS, FISHERS))
    for fn in (
        lambda m, f: merge.average(m),
        lambda m, f: merge.fisher(m, fishers=f, normalize=True, favor=0),
    ):
        eager, jitted = fn(models, fishers), jax.jit(fn)(models, fishers)
        for a, b in zip(_flat(eager), _flat(jitted), strict=True):
            np.testing.assert_allclose(a, b, atol=8 * 2.0**-24 * 10)

    def loss(weights):
        return sum(
            jnp.sum(x**2) for x in jax.tree.leaves(merge.fisher(models, fishers=fishers, weights=weights))
        )

    gradient = jax.jit(jax.grad(loss))(jnp.ones(3))
    step = 1e-2
    for i in range(3):
        numeric = (loss(jnp.ones(3).at[i].add(step)) - loss(jnp.ones(3).at[i].add(-step))) / (2 * step)
        np.testing.assert_allclose(gradient[i], numeric, rtol=1e-2)


def test_heads_are_taken_by_name():
    target, donor = dict(MODELS[0]), dict(MODELS[1])
    donor["head"] = {"kernel": np.ones((24, 3), np.float32), "bias": np.ones(3, np.float32)}
    with pytest.raises(errors.StructureError, match=r"only in model 1: `head\.bias`.*`keep`"):
        merge.average([target, donor])
    merged = merge.average([target, donor], keep=[("^head", 0)])
    assert list(merged["head"]) == ["kernel"]
    np.testing.assert_array_equal(merged["head"]["kernel"], target["head"]["kernel"])
    merged = merge.fisher(
        [target, donor],
        fishers=[{k: f[k] for k in ("body", "norm")} for f in FISHERS[:2]],
        keep=[("^head", 1)],
    )
    np.testing.assert_array_equal(merged["head"]["bias"], donor["head"]["bias"])
    only_body = merge.average(MODELS, keep=[("^body", None), ("", 2)])
    np.testing.assert_array_equal(only_body["norm"], MODELS[2]["norm"])
    np.testing.assert_array_equal(only_body["body"]["bias"], merge.average(MODELS)["body"]["bias"])
    with pytest.raises(errors.UsageError, match="matches no leaf"):
        merge.average(MODELS, keep=[("^haed", 0)])
    with pytest.raises(errors.UsageError, match="models 0 to 2"):
        merge.average(MODELS, keep=[("^head", 3)])


def test_integer_leaves_must_be_equal():
    counted = [{**m, "count": np.array([3], np.int32)} for m in MODELS]
    assert merge.average(counted)["count"].dtype == np.int32
    fishers = [{**f} for f in FISHERS]
    assert merge.fisher(counted, fishers=fishers)["count"][0] == 3
    counted[2] = {**counted[2], "count": np.array([4], np.int32)}
    with pytest.raises(errors.StructureError, match=r"`count`.*differs between model 0 and model 2"):
        merge.average(counted)
    assert merge.average(counted, keep=[("^count$", 2)])["count"][0] == 4
    with pytest.raises(errors.StructureError, match="under `jit`"):
        jax.jit(lambda m: merge.average(m))(counted)


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"norm": np.ones(2, np.float32)}, r"`norm` is float32\[\] in model 0 and float32\[2\] in model 1"),
        ({"norm": np.ones((), np.float16)}, "float16"),
        ({"more": np.ones(2, np.float32)}, "only in model 1: `more`"),
    ],
)
def test_models_that_differ_are_refused(change, wrong):
    with pytest.raises(errors.StructureError, match=wrong):
        merge.average([MODELS[0], {**MODELS[1], **change}])


@pytest.mark.parametrize(
    "weights, wrong",
    [
        ([1, 2], "got 2"),
        ([1, 2, float("nan")], "finite"),
        ([1, float("inf"), 1], "finite"),
        ([0, 0, 0], "sum to zero"),
        (1.0, "got 1"),
    ],
)
def test_wrong_weights_are_refused(weights, wrong):
    for fn in (merge.average, lambda m, weights: merge.fisher(m, fishers=FISHERS, weights=weights)):
        with pytest.raises(errors.UsageError, match=wrong):
            fn(MODELS, weights=weights)


def test_wrong_fishers_are_refused():
    bad = jax.tree.map(np.copy, FISHERS[1])
    bad["body"]["bias"][3] = -1e-9
    with pytest.raises(errors.UsageError, match=r"`fishers` \(number 1\).*`body\.bias`"):
        merge.fisher(MODELS, fishers=[FISHERS[0], bad, FISHERS[2]])
    bad["body"]["bias"][3] = np.nan
    with pytest.raises(errors.UsageError, match=r"`fishers` \(number 1\)"):
        merge.fisher(MODELS, fishers=[FISHERS[0], bad, FISHERS[2]])
    none = jax.tree.map(np.zeros_like, FISHERS[0])
    with pytest.raises(errors.UsageError, match="zero everywhere"):
        merge.fisher(MODELS, fishers=[none, *FISHERS[1:]], normalize=True)
    with pytest.raises(errors.UsageError, match="got 2"):
        merge.fisher(MODELS, fishers=FISHERS[:2])
    with pytest.raises(errors.StructureError, match=r"`fishers` of model 0.*`body\.bias`"):
        merge.fisher(MODELS, fishers=[{"norm": FISHERS[0]["norm"]}, *FISHERS[1:]])
    for options in ({"weights": [1, -1, 2]}, {"floor": -1.0}, {"floor": float("nan")}, {"favor": 3}):
        with pytest.raises(errors.UsageError, match="must be"):
            merge.fisher(MODELS, fishers=FISHERS, **options)


def test_no_models():
    with pytest.raises(errors.UsageError, match="at least one"):
        merge.average([])
