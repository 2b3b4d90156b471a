"""What every method of `merge.METHODS` owes: shapes, dtypes, one result in every engine."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fishjax import merge, tree
from fishjax.merge import _trees as _merging
from tests import merge_formulas

OPTIONS = {
    "average": {"weights": [1.0, 2.5]},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "dare": {"density": 0.5, "rescale": "l1"},
    "fisher": {"normalize": True, "favor": 1},
    "gradient_matching": {"weights": [0.3, 1.7]},
    "model_stock": {},
    "nuslerp": {"t": 0.3},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weights": [0.3, -1.0]},
    "ties": {"density": 0.3},
    "wise_ft": {"alpha": 0.3},
}
MEASURED = {"dare", "fisher", "model_stock", "nuslerp", "slerp"}  # sums, whose order XLA chooses
UNIT = 2.0**-24


def _trees(dtype, xp=np, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (64, 48), "b": (96,), "c": (1,), "d": ()}
    make = lambda: {
        "x": {
            n: xp.asarray(rng.standard_normal(s).astype(np.float32)).astype(dtype) for n, s in shapes.items()
        }
    }
    base = make()
    tuned = [
        jax.tree.map(lambda b, d: (b + d * b.dtype.type(0.1)).astype(dtype), base, make()) for _ in range(2)
    ]
    fishers = [jax.tree.map(lambda x: xp.abs(x).astype(np.float32), make()) for _ in range(3)]
    return tuned, base, fishers


def _call(method, trees, **more):
    tuned, base, fishers = trees
    wanted = inspect.signature(getattr(merge, method)).parameters
    given = {"base": base, "fishers": fishers[:2], "base_fisher": fishers[2]}
    options = {**OPTIONS[method], **{k: v for k, v in given.items() if k in wanted}, **more}
    return getattr(merge, method)(tuned[:1] if method == "wise_ft" else tuned, **options)


def _terms(method, trees, **options):
    """Return the terms that a method's formula adds up, `[terms, *p]` in float64 for every leaf."""
    wide = lambda t: {n: np.asarray(x, np.float64) for n, x in tree.flatten(t).items()}
    tuned, base, fishers = trees
    models = [wide(m) for m in (tuned[:1] if method == "wise_ft" else tuned)]
    given = OPTIONS[method] | options
    found = getattr(merge_formulas, method)(models, wide(base), [wide(f) for f in fishers], **given)
    return {n: np.stack(np.broadcast_arrays(*terms)) for n, terms in found.items()}


def _within(a, b, terms):
    """Hold two trees to what any two engines, and a rule and its formula, may differ by."""
    a, b = tree.flatten(a), tree.flatten(b)
    for n, parts in terms.items():
        off = abs(np.asarray(a[n], np.float64) - np.asarray(b[n], np.float64))
        assert np.all(off <= 8 * UNIT * abs(parts).sum(0)), n


def test_every_method_is_here():
    assert set(OPTIONS) == set(merge.METHODS)
    assert all(callable(getattr(merge, m)) for m in merge.METHODS)


@pytest.mark.parametrize("method", merge.METHODS)
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64], ids=str)
def test_shapes_and_dtypes_are_kept(method, dtype):
    trees = _trees(dtype)
    merged = _call(method, trees)
    kinds = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    assert kinds(merged) == kinds(trees[1])
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(merged))


@pytest.mark.parametrize("method", merge.METHODS)
def test_float32_against_the_formula_in_float64(method):
    trees = _trees(np.float32)
    terms = _terms(method, trees)
    _within(_call(method, trees), {n: parts.sum(0) for n, parts in terms.items()}, terms)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [2.0, 0.5]])
@pytest.mark.parametrize("method", merge.METHODS)
def test_a_block_is_not_written_to(method, weights, monkeypatch):
    trees = _trees(np.float32)
    takes = "weights" in inspect.signature(getattr(merge, method)).parameters and method != "wise_ft"
    options = {"weights": weights} if weights and takes else {}
    want = _call(method, trees, **options)
    for x in jax.tree.leaves(trees):
        x.setflags(write=False)
    monkeypatch.setattr(_merging, "widen", lambda block, dtype: block)  # else rules see copies
    jax.tree.map(np.testing.assert_array_equal, _call(method, trees, **options), want)


@pytest.mark.parametrize("method", merge.METHODS)
def test_jit_eager_and_numpy_agree(method):
    plain = _trees(np.float32)
    terms = _terms(method, plain)
    trees = jax.tree.map(jnp.asarray, plain)
    eager, jitted = _call(method, trees), jax.jit(lambda t: _call(method, t))(trees)
    _within(jitted, eager, terms)
    _within(_call(method, plain), eager, terms)
    if method not in MEASURED | {"average"}:  # XLA divides by a constant with its reciprocal
        jax.tree.map(np.testing.assert_array_equal, _call(method, plain), eager)  # the same lines, no fusion


@pytest.mark.parametrize("method", merge.METHODS)
def test_sharded_equals_unsharded(method):
    plain = _trees(np.float32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda x: PartitionSpec("x") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
    trees = jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec(x))), plain)
    fn = jax.jit(lambda t: _call(method, t))
    sharded, whole = fn(trees), jax.jit(lambda t: _call(method, t))(jax.tree.map(jnp.asarray, plain))
    assert len(sharded["x"]["a"].sharding.device_set) == 8
    if method in MEASURED:  # `fisher` also adds two products, of which XLA may fuse either
        _within(sharded, whole, _terms(method, plain))
    else:
        jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    text = fn.lower(trees).compile().as_text()
    assert "all-gather" not in text  # elementwise rules never gather


@pytest.mark.parametrize("method", merge.METHODS)
def test_bfloat16_is_rounded_once(method):
    rng = np.random.default_rng(1)
    make = lambda: {"w": rng.standard_normal(50_000).astype(jnp.bfloat16)}
    base = make()
    tuned = [{"w": base["w"] + (0.1 * rng.standard_normal(50_000)).astype(jnp.bfloat16)} for _ in range(2)]
    trees = tuned, base, [{"w": rng.random(50_000).astype(np.float32)} for _ in range(3)]
    irrational = {
        "average": {"weights": [0.6180339, 0.2718281]},
        "task_arithmetic": {"weights": [0.3141592, -0.2718281]},
    }
    more = irrational.get(method, {})
    got, parts = _call(method, trees, **more)["w"], _terms(method, trees, **more)["w"]
    exact = parts.sum(0)
    assert (got == exact.astype(jnp.bfloat16)).mean() >= 0.999
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(abs(exact), 1e-30))) - 7)
    assert np.all(abs(got.astype(np.float64) - exact) <= spacing / 2 + 8 * UNIT * abs(parts).sum(0))
