"""Masks against a full sort, and the gate against what optimisers do before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import masks, tree
from fishjax.errors import StructureError, UsageError
from fishjax.masks import _largest


def scores(seed=0, ties=False):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(0, 4, s).astype(np.float32)) if ties else (lambda s: rng.normal(size=s))
    shapes = {"b": (7,), "a": {"w": (5, 4), "v": (3, 2, 2)}, "head": (6,)}
    return jax.tree.map(
        lambda s: jnp.asarray(draw(s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def by_sort(tree, keep):
    """The stated rule, by a stable sort: value first, then order of leaves, then index."""
    flat = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask


def concat(mask):
    return np.concatenate([np.asarray(m).reshape(-1) for m in jax.tree.leaves(mask)])


@given(st.floats(0.03, 1.0), st.booleans(), st.integers(0, 5))
def test_topk_is_a_full_sort_with_exact_budget(density, ties, seed):
    tree = scores(seed, ties)
    mask = masks.topk(tree, density=density)
    np.testing.assert_array_equal(concat(mask), by_sort(tree, round(density * 45)))


def test_topk_of_each_leaf_is_a_sort_of_each_leaf():
    tree = scores(ties=True)
    mask = masks.topk(tree, density=0.3, scope="leaf")
    for leaf, kept in zip(jax.tree.leaves(tree), jax.tree.leaves(mask)):
        np.testing.assert_array_equal(concat(kept), by_sort(leaf, round(0.3 * leaf.size)))


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_rules_include_exclude_and_charge_always(scope):
    mask = masks.topk(scores(), density=0.5, scope=scope, exclude="^b$", always="head")
    assert mask["head"].all() and not mask["b"].any()
    assert masks.count(mask) == round(0.5 * 38)  # of the 38 entries that are not excluded
    only = masks.topk(scores(), density=0.5, include=["a.w", "head"])
    assert masks.count(only) == 13 and not only["a"]["v"].any()


def test_negative_scores_and_minus_infinity_compare_by_value():
    mask = masks.topk({"w": jnp.array([-jnp.inf, -3.0, -1.0, -2.0])}, density=0.5)
    np.testing.assert_array_equal(mask["w"], [False, False, True, True])


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan"), 1e-9])
def test_density_out_of_range_is_refused(density):
    with pytest.raises(UsageError, match="density"):
        masks.topk(scores(), density=density)


def test_nan_scores_and_too_small_budgets_are_refused():
    with pytest.raises(UsageError, match="`w` has NaN"):
        masks.topk({"w": jnp.array([1.0, jnp.nan])}, density=0.5)
    with pytest.raises(UsageError, match="less than the 6 that must be kept"):
        masks.topk(scores(), density=0.1, always="head")
    with pytest.raises(UsageError, match="scope"):
        masks.topk(scores(), density=0.1, scope="row")
    with pytest.raises(UsageError, match="matches no leaf"):
        masks.topk(scores(), density=0.1, include="nothing")


@pytest.fixture
def small_chunks(monkeypatch):
    """Sizes at which a few thousand entries take every way through the selection."""
    for name, value in {"_CHUNK": 64, "_SAMPLE": 32, "_ROOM": 8}.items():
        monkeypatch.setattr(_largest, name, value)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising", "falling", "infinite"])
def test_streaming_is_a_full_sort(small_chunks, density, kind):
    rng = np.random.default_rng(3)
    flat = {
        "normal": rng.normal(size=3000),
        "ties": rng.integers(0, 3, 3000),
        "equal": np.zeros(3000),
        "rising": np.arange(3000.0),
        "falling": -np.arange(3000.0),
        "infinite": rng.choice([-np.inf, 0.0, -0.0, np.inf], 3000),
    }[kind].astype(np.float32)
    leaves = {"a": flat[:1000].reshape(20, 50), "b": flat[1000:1001], "c": flat[1001:].reshape(-1, 1)}
    kept = masks.indices(leaves, density=density)
    mask = concat(masks.from_indices(leaves, kept))
    np.testing.assert_array_equal(mask, by_sort(leaves, round(density * 3000)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "uint32", "int64"])
def test_any_real_dtype_is_ranked_by_value(small_chunks, dtype):
    drawn = np.random.default_rng(0).integers(0 if dtype[0] == "u" else -100, 100, 3000)
    x = drawn.astype(jnp.dtype(dtype))
    kept = masks.indices({"w": x}, density=0.1)["w"]
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-drawn, kind="stable")[:300]))


@pytest.mark.parametrize("every", [1, 32, 10_000])
@pytest.mark.parametrize("guess", [-np.inf, -1.0, 1.2, 1.3, 3.0, np.inf])
def test_neither_guess_decides_what_is_kept(small_chunks, monkeypatch, guess, every):
    leaves = {"a": np.random.default_rng(5).normal(size=3000).round(2).astype(np.float32)}
    monkeypatch.setattr(_largest, "_guess", lambda *_: np.float32(guess))
    monkeypatch.setattr(_largest, "_EVERY", every)
    kept = masks.indices(leaves, density=0.1)
    np.testing.assert_array_equal(concat(masks.from_indices(leaves, kept)), by_sort(leaves, 300))


def test_rows_of_large_scores_do_not_mislead_the_guess():
    rng = np.random.default_rng(6)
    rows = np.exp(3 * rng.normal(size=(1 << 13, 1))) * rng.normal(size=(1 << 13, 1 << 8)) ** 2
    pieces = [_largest.Piece("w", rows.astype(np.float32).reshape(-1), lambda at: at)]
    for count in (2_000, 10_000, 400_000):
        bound = _largest._guess(pieces, count, rows.size, np.dtype(np.float32))
        reached = np.count_nonzero(pieces[0].entries >= bound)
        assert count <= reached < 1.5 * count + 60_000


def test_nan_is_refused_wherever_it_hides(small_chunks):
    for place in (0, 700, 1999):
        x = np.ones(2000, np.float32)
        x[place] = np.nan
        for density in (0.01, 1.0):
            with pytest.raises(UsageError, match="`w` has NaN"):
                masks.indices({"v": np.ones(3, np.float32), "w": x}, density=density)


def test_a_layer_has_its_own_budget_and_every_leaf_its_minimum():
    rng = np.random.default_rng(0)
    names = ("emb.w", "block.0.a", "block.0.b", "block.1.a", "block.1.b", "head.w")
    flat = {n: rng.normal(size=40).astype(np.float32) + 9 * (n[-1] == "a") for n in names}
    kept = masks.indices(tree.nest(flat), density=0.2, scope="layer")
    assert {n: len(w) for n, w in kept.items()} == {"emb.w": 8, "block.0.a": 16, "block.1.a": 16, "head.w": 8}
    least = masks.indices(tree.nest(flat), density=0.2, minimum=3)
    assert sum(map(len, least.values())) == 48 and min(map(len, least.values())) == 3
    for name, x in flat.items():  # in each leaf its largest, and beyond the minimum the largest of all
        assert set(least[name]) == set(np.argsort(-x)[: len(least[name])])
    beyond = [x for n, w in least.items() for x in np.sort(flat[n][w])[:-3]]
    left = np.concatenate([np.delete(flat[n], w) for n, w in least.items()])
    assert len(beyond) == 30 and min(beyond) > max(left)
    assert all(len(w) == 9 for w in masks.indices(flat, density=0.2, scope="leaf", minimum=9).values())
    with pytest.raises(UsageError, match="`minimum` 9 of each of 6 leaves is more than their budget of 48"):
        masks.indices(flat, density=0.2, minimum=9)


def test_rank_budgets_are_those_of_lora():
    tree_ = scores()
    kept = masks.indices(tree_, rank=2, always="head")
    assert {n: len(w) for n, w in kept.items()} == {"a.w": 18, "head": 6}
    np.testing.assert_array_equal(concat(masks.topk(tree_, rank=2)["a"]["w"]), by_sort(tree_["a"]["w"], 18))
    for wrong in ({}, {"rank": 1, "density": 0.1}, {"rank": 0}, {"rank": 1, "include": "^b$"}):
        with pytest.raises(UsageError, match="rank"):
            masks.indices(tree_, **wrong)


@pytest.mark.parametrize("spec", [("x", None), (None, "y"), ("y", "x"), (("x", "y"), None), (None, None)])
@pytest.mark.parametrize("options", [{}, {"scope": "leaf"}, {"minimum": 5}])
def test_sharded_scores_give_the_same_masks_sharded_alike(spec, options):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    whole = {"a": rng.integers(0, 9, (8, 16)).astype(np.float32), "b": rng.normal(size=7).astype(np.float32)}
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    sharded = {"a": jax.device_put(whole["a"], sharding), "b": jnp.asarray(whole["b"])}
    mask = masks.topk(sharded, density=0.3, **options)
    np.testing.assert_array_equal(concat(mask), concat(masks.topk(whole, density=0.3, **options)))
    if sharding.is_fully_replicated is False:
        assert mask["a"].sharding.is_equivalent_to(sharding, 2)


def test_baselines_by_gradient_movement_and_bias():
    params = {"w": jnp.array([1.0, -4.0, 2.0]), "bias": jnp.array([0.5])}
    gradient = {"w": jnp.array([-9.0, 1.0, 0.1]), "bias": jnp.array([0.0])}
    tuned = {"w": jnp.array([1.0, -4.5, 9.0]), "bias": jnp.array([0.4])}
    np.testing.assert_array_equal(
        concat(masks.saliency(params, gradient, density=0.5)), [False, True, True, False]
    )
    np.testing.assert_array_equal(
        concat(masks.movement(params, tuned, density=0.25)), [False, False, False, True]
    )
    np.testing.assert_array_equal(concat(masks.bitfit(params)), [True, False, False, False])
    half = {"w": jnp.array([1.0, 256.0], jnp.bfloat16)}
    moved = {"w": jnp.array([1.0078125, 256.0], jnp.bfloat16)}
    assert masks.movement(half, moved, density=0.5)["w"][0]
    with pytest.raises(StructureError):
        masks.saliency(params, {"w": gradient["w"]}, density=0.5)


def test_a_leaf_of_more_than_2_31_entries(tmp_path):
    with open(tmp_path / "scores", "wb") as file:  # sparse on disk; int8, so that it takes a second
        file.truncate((1 << 31) + 100)
    scores = np.memmap(tmp_path / "scores", np.int8, "r+", shape=(4, (1 << 29) + 25))
    where = [5, (1 << 31) + 7, (1 << 31) + 99]
    scores.reshape(-1)[where] = [1, 2, 1]
    kept = masks.indices({"w": scores}, density=3 / scores.size)
    np.testing.assert_array_equal(kept["w"], where)


@pytest.mark.parametrize("kept", [[1, 0], [2, 2], [-1], [3], [2**32 + 1], [0.0]], ids=lambda x: str(x))
def test_masks_of_bad_positions_are_refused(kept):
    with pytest.raises(StructureError, match="positions in `w`"):
        masks.from_indices({"w": jnp.zeros(3)}, {"w": np.array(kept)})
    with pytest.raises(StructureError, match="no leaf"):
        masks.from_indices({"w": jnp.zeros(3)}, {"v": np.array([0])})


def test_random_masks_are_uniform_and_seeded(key):
    params = {"a": jnp.ones(300), "b": jnp.ones(700)}
    counts = sum(
        np.asarray(masks.random(k, params, density=0.1)["a"], int) for k in jax.random.split(key, 200)
    )
    assert abs(counts.mean() - 20) < 0.5 and 0.5 < counts.var() / 18 < 1.5  # binomial(200, 0.1)
    first, again = (masks.random(key, params, density=0.1) for _ in range(2))
    assert masks.overlap(first, again) == 1.0 and masks.count(first) == 100


def test_magnitude_and_by_name():
    params = {"w": jnp.array([-3.0, 1.0, 2.0]), "bias": jnp.array([0.1])}
    np.testing.assert_array_equal(concat(masks.magnitude(params, density=0.5)), [False, True, False, True])
    assert masks.count(masks.by_name(params, "bias$")) == 1


def test_algebra():
    a, b = {"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, False])}
    assert masks.count(masks.union(a, b)) == 2 and masks.count(masks.intersection(a, b)) == 1
    assert masks.overlap(a, b) == 0.5 and masks.density(a) == pytest.approx(2 / 3)
    with pytest.raises(StructureError):
        masks.union(a, {"v": jnp.array([True])})


def test_split_deals_the_largest_by_rank():
    parts = masks.split(scores(), 3, density=0.2)
    assert [masks.count(p) for p in parts] == [9, 9, 9]
    assert masks.count(masks.union(*parts)) == 27
    np.testing.assert_array_equal(concat(masks.union(*parts)), by_sort(scores(), 27))
    order = np.argsort(-np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(scores())]))
    assert all(concat(parts[i % 3])[order[i]] for i in range(27))
    with pytest.raises(UsageError, match="disjoint"):
        masks.split(scores(), 3, density=0.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9, nesterov=True), optax.lion(1e-2)],
)
def test_gated_entries_stay_bit_identical(key, optimizer, dtype):
    params = {"w": jax.random.normal(key, (40,), dtype).at[0].set(-0.0).at[1].set(1e-39)}  # subnormal
    mask = masks.topk({"w": jnp.arange(40.0)}, density=0.25)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer, masks.gate(mask))

    def step(held, _):
        params, state = held
        grads = jax.grad(lambda p: ((p["w"] - 1) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return (masks.apply_updates(params, updates, mask), state), None

    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes int32 counts and Python floats
        run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=2000)[0][0])
        tuned = run(params)
    bits = lambda x: np.asarray(x).view(np.uint16 if dtype == jnp.bfloat16 else np.uint32)
    np.testing.assert_array_equal(bits(params["w"]) == bits(tuned["w"]), ~np.asarray(mask["w"]))
    assert bits(params["w"])[1] not in (0, 0x8000)


def test_gate_carries_its_mask_as_state_and_checks_it():
    mask = {"w": jnp.array([True, False])}
    state = masks.gate(mask).init({"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.mask["w"], mask["w"])
    with pytest.raises(StructureError):
        masks.gate(mask).init({"w": jnp.ones(3)})
