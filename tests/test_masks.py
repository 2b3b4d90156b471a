"""Masks against a full sort, and the gate against what optimisers do before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import masks
from fishjax.errors import StructureError, UsageError


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
        masks.topk(scores(), density=0.1, scope="layer")
    with pytest.raises(UsageError, match="matches no leaf"):
        masks.topk(scores(), density=0.1, include="nothing")


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


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9, nesterov=True), optax.lion(1e-2)],
)
def test_gated_entries_stay_bit_identical(key, optimizer):
    params = {"w": jax.random.normal(key, (40,)).at[0].set(-0.0)}
    mask = masks.topk({"w": jnp.arange(40.0)}, density=0.25)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer, masks.gate(mask))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: ((p["w"] - 1.0) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    tuned, state = params, tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes int32 counts and Python floats
        for _ in range(50):
            tuned, state = step(tuned, state)
    same = np.asarray(params["w"]).view(np.uint32) == np.asarray(tuned["w"]).view(np.uint32)
    np.testing.assert_array_equal(same, ~np.asarray(mask["w"]))


def test_gate_carries_its_mask_as_state_and_checks_it():
    mask = {"w": jnp.array([True, False])}
    state = masks.gate(mask).init({"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.mask["w"], mask["w"])
    with pytest.raises(StructureError):
        masks.gate(mask).init({"w": jnp.ones(3)})
