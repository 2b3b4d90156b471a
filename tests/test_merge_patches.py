"""Patches merge as patches, and by precision: sums, laws, revocation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import checkpoint, errors, merge, patches, tree

RNG = np.random.default_rng(0)
BASE = {
    "a": {
        "w": RNG.standard_normal((6, 8)).astype(np.float32),
        "b": RNG.standard_normal(8).astype(np.float32),
    },
    "c": RNG.standard_normal((5, 4)).astype(np.float32),
}


def _sparse(seed, name="a.w", n=12):
    rng = np.random.default_rng(seed)
    leaf = tree.flatten(BASE)[name]
    indices = np.sort(rng.choice(leaf.size, n, replace=False)).astype(np.int32)
    return {name: patches.Sparse(indices, rng.standard_normal(n).astype(np.float32))}


def _low_rank(seed, r=2):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    return {"a.w": patches.LowRank(draw(6, 1, r), draw(1, 8, r), 0.5)}


def _scale(seed):
    rng = np.random.default_rng(seed)
    return {
        "a.w": patches.Scale(
            jnp.asarray(1 + 0.1 * rng.standard_normal((1, 8)), jnp.float32), (("a.b", (8,)),)
        )
    }


def _dense(seed):
    return {"c": patches.Dense(np.random.default_rng(seed).standard_normal((5, 4)).astype(np.float32))}


def _want(parts, weights):
    base = tree.flatten(BASE)
    applied = [tree.flatten(patches.apply(BASE, p)) for p in parts]
    return {
        n: x + sum(w * (np.asarray(a[n], np.float64) - x) for w, a in zip(weights, applied, strict=True))
        for n, x in base.items()
    }


@pytest.mark.parametrize(
    "parts, kind",
    [
        ([_sparse(1), _sparse(2), _sparse(3)], patches.Sparse),
        ([_low_rank(1), _low_rank(2)], patches.LowRank),
        ([_scale(1), _scale(2)], patches.Scale),
        ([_dense(1), _dense(2)], patches.Dense),
        ([_sparse(1), _low_rank(2), _scale(3)], patches.Dense),
        ([_sparse(1, "a.b", 3), _scale(3)], patches.Dense),
        ([_sparse(1), _dense(2) | _sparse(4, "a.b", 4)], patches.Sparse),
    ],
)
def test_a_merged_patch_does_what_its_parts_do_together(parts, kind):
    weights = [0.5, -1.0, 2.0][: len(parts)]
    merged = merge.patches(BASE, parts, weights=weights)
    got = tree.flatten(patches.apply(BASE, merged))
    for name, want in _want(parts, weights).items():
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-6, err_msg=name)
    assert kind in {type(k) for k in merged.values()}


def test_sparse_stays_sparse():
    merged = merge.patches(BASE, [_sparse(1), _sparse(2)])["a.w"]
    union = set(_sparse(1)["a.w"].indices.tolist()) | set(_sparse(2)["a.w"].indices.tolist())
    assert merged.indices.tolist() == sorted(union)


def test_low_rank_is_compressed_on_request():
    parts = [_low_rank(i, 3) for i in range(3)]
    whole = merge.patches(BASE, parts)["a.w"]
    assert whole.a.shape == (6, 1, 9)
    for rank in (1, 4, 6):
        small = merge.patches(BASE, parts, rank=rank)["a.w"]
        assert small.a.shape == (6, 1, rank) and small.b.shape == (1, 8, rank)
        sizes = np.linalg.svd(np.asarray(whole.delta(), np.float64), compute_uv=False)
        lost = np.linalg.norm(small.delta() - whole.delta())
        np.testing.assert_allclose(lost, np.sqrt((sizes[rank:] ** 2).sum()), atol=1e-5)  # Eckart and Young


def test_logs_of_scales_multiply():
    one, two = _scale(1), _scale(2)
    merged = merge.patches(BASE, [one, two], scales="logs")
    np.testing.assert_allclose(merged["a.w"].vector, one["a.w"].vector * two["a.w"].vector, rtol=1e-6)
    half = merge.patches(BASE, [one, one], scales="logs", weights=[0.5, 0.5])
    np.testing.assert_allclose(half["a.w"].vector, one["a.w"].vector, rtol=1e-6)
    negative = {"a.w": patches.Scale(-one["a.w"].vector, one["a.w"].tied)}
    with pytest.raises(errors.UsageError, match="logs"):
        merge.patches(BASE, [one, negative], scales="logs")


def test_bad_patches():
    with pytest.raises(errors.UsageError, match="at least one"):
        merge.patches(BASE, [])
    with pytest.raises(errors.UsageError, match="got 1"):
        merge.patches(BASE, [_sparse(1), _sparse(2)], weights=[1])
    with pytest.raises(errors.StructureError, match="does not have"):
        merge.patches({"x": np.ones(2)}, [_sparse(1)])


# Precision algebra


def _evidence(seed, name="w", size=40):
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(size, rng.integers(1, size), replace=False))
    precision = np.exp(rng.standard_normal(indices.size) * 3)
    return {name: merge.Evidence(indices, precision, precision * rng.standard_normal(indices.size))}


def _same(a, b, rtol=1e-12):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name].indices, b[name].indices)
        np.testing.assert_allclose(a[name].precision, b[name].precision, rtol=rtol)
        np.testing.assert_allclose(
            a[name].shift, b[name].shift, rtol=rtol, atol=rtol * abs(b[name].shift).max()
        )


seeds = st.integers(0, 2**31)


@given(seeds, seeds, seeds)
def test_addition_is_commutative_and_associative(x, y, z):
    a, b, c = _evidence(x), _evidence(y), _evidence(z, "v") | _evidence(z)
    _same(merge.add(a, b), merge.add(b, a), rtol=0)
    _same(merge.add(merge.add(a, b), c), merge.add(a, merge.add(b, c)))


@given(seeds, seeds)
def test_what_is_revoked_was_never_there(x, y):
    a, bad = _evidence(x), _evidence(y)
    base = {"w": np.zeros(40)}
    left, want = merge.resolve(base, merge.subtract(merge.add(a, bad), bad))["w"], merge.resolve(base, a)["w"]
    np.testing.assert_array_equal(left.indices, want.indices)
    np.testing.assert_allclose(left.values, want.values, rtol=1e-12)


def test_a_poisoned_contribution_is_revoked_however_large_it_is():
    a, b = _evidence(1), _evidence(2)
    bad = {n: merge.Evidence(e.indices, 1e12 * e.precision, -3e13 * e.shift) for n, e in _evidence(1).items()}
    _same(merge.subtract(merge.add(a, bad, b), bad), merge.add(a, b))
    _same(merge.subtract(merge.add(bad, merge.add(b, a)), bad), merge.add(a, b))
    plain = {n: e._replace(rest=None) for n, e in merge.add(bad, _evidence(1)).items()}
    assert (
        merge.subtract(plain, bad) == {}
    )  # rounding in a sum that was stored without its rest is no evidence


def test_floor_and_factor_come_in_when_information_is_resolved():
    parts = [_dense(i) for i in range(3)]
    precisions = [{"c": np.random.default_rng(20 + i).random((5, 4))} for i in range(3)]
    one, two, three = (merge.information(BASE, p, f) for p, f in zip(parts, precisions, strict=True))
    known = merge.add(merge.add(one, two), three)
    half = {"prior": {"c": np.full((5, 4), 0.3)}, "normalize": {"c": 0.5}.get}
    got = patches.apply(BASE, merge.resolve(BASE, known, **half))["c"]
    models = [*({"c": p["c"].values} for p in parts), {"c": BASE["c"]}]
    fishers = [*({"c": 0.5 * f["c"]} for f in precisions), half["prior"]]
    np.testing.assert_allclose(got, merge.fisher(models, fishers=fishers, floor=0)["c"], rtol=1e-4, atol=1e-6)
    mass = 0.5 * sum(f["c"] for f in precisions)
    shift = 0.5 * sum(f["c"] * (p["c"].values - BASE["c"]) for p, f in zip(parts, precisions, strict=True))
    half = {"floor": 0.8, "normalize": half["normalize"]}
    assert (mass < 0.8).any() and (mass > 0.8).any()
    got = merge.resolve(BASE, known, **half)["c"].values
    np.testing.assert_allclose(got, (BASE["c"] + shift / np.maximum(mass, 0.8)).reshape(-1), rtol=1e-5)
    other = merge.resolve(BASE, merge.add(three, merge.add(two, one)), **half)["c"].values
    np.testing.assert_array_equal(got, other)


def test_deltas_merge_as_the_sparse_patches_that_they_are():
    sparse = _sparse(1)["a.w"]
    delta = patches.Delta(np.arange(-6, 6).astype(np.int8), np.float32([0.5]), sparse.indices)
    values = BASE["a"]["w"].reshape(-1)[sparse.indices] + np.float32(0.5) * np.arange(-6, 6, dtype=np.float32)
    same = {"a.w": patches.Sparse(sparse.indices, values)}
    merged = merge.patches(BASE, [{"a.w": delta}, _sparse(2)])["a.w"]
    want = merge.patches(BASE, [same, _sparse(2)])["a.w"]
    np.testing.assert_array_equal(merged.indices, want.indices)
    np.testing.assert_array_equal(merged.values, want.values)
    found = merge.information(BASE, {"a.w": delta}, tree.nest({"a.w": np.full(12, 4.0)}))["a.w"]
    np.testing.assert_array_equal(found.shift, 2.0 * np.arange(-6, 6))
    whole = patches.Delta(np.arange(-10, 10).astype(np.int8), np.float32([2.0, 4.0]), block=16)
    found = merge.information(BASE, {"c": whole}, {"c": np.ones((5, 4))})["c"]
    np.testing.assert_array_equal(found.shift, np.arange(-10, 10) * np.repeat([2.0, 4.0], [16, 4]))


@given(seeds, seeds)
def test_an_ancestor_counts_once(x, y):
    ancestor = _evidence(x)
    left, right = merge.add(ancestor, _evidence(y)), merge.add(ancestor, _evidence(y + 1))
    merged, guarded = merge.three_way(left, right, ancestor)
    want = merge.add(ancestor, _evidence(y), _evidence(y + 1))
    assert guarded == 0
    _same(merged, want, rtol=1e-9)


def test_an_ancestor_that_knew_more_is_guarded():
    one = lambda p, s: {"w": merge.Evidence(np.array([3]), np.array([p]), np.array([s]))}
    merged, guarded = merge.three_way(one(1.0, 2.0), one(2.0, 2.0), one(5.0, 0.0))
    assert guarded == 1 and merged["w"].precision == 2.0 and merged["w"].shift == 2.0


def test_information_of_patches_resolves_to_fisher_merging():
    precisions = [{"c": np.random.default_rng(20 + i).random((5, 4))} for i in range(3)]
    parts = [_dense(i) for i in range(3)]
    known = merge.add(*(merge.information(BASE, p, f) for p, f in zip(parts, precisions, strict=True)))
    got = patches.apply(BASE, merge.resolve(BASE, known))["c"]
    models = [{"c": p["c"].values} for p in parts]
    np.testing.assert_allclose(got, merge.fisher(models, fishers=precisions, floor=0)["c"], rtol=1e-5)
    # with a prior the base is one model more
    prior = {"a": jax.tree.map(np.ones_like, BASE["a"]), "c": np.full((5, 4), 0.3)}
    got = patches.apply(BASE, merge.resolve(BASE, known, prior=prior))["c"]
    more = merge.fisher([*models, {"c": BASE["c"]}], fishers=[*precisions, {"c": prior["c"]}], floor=0)
    np.testing.assert_allclose(got, more["c"], rtol=1e-4, atol=1e-6)


def test_an_entry_of_one_contributor_needs_the_prior():
    part = _sparse(1)
    precision = {"a.w": np.full(12, 3.0)}
    known = merge.information(BASE, part, tree.nest(precision))
    alone = merge.resolve(BASE, known)["a.w"]
    np.testing.assert_allclose(alone.values, part["a.w"].values, rtol=1e-6)
    held = merge.resolve(BASE, known, prior=1.0)["a.w"].values
    base = BASE["a"]["w"].reshape(-1)[part["a.w"].indices]
    np.testing.assert_allclose(held, base + 0.75 * (part["a.w"].values - base), rtol=1e-5)


def test_a_contribution_that_is_revoked_was_never_merged(tmp_path):
    """Three files with their Fishers; the merge without the second is, after `subtract`, the same patch."""
    for i in range(3):
        precision = {n: np.random.default_rng(i).random(12) for n in ("a.w",)}
        patch = _sparse(i) | ({"c": _dense(i)["c"]} if i == 1 else {})
        precision |= {"c": np.ones((5, 4))} if i == 1 else {}
        checkpoint.save_patch(tmp_path / f"{i}", patch, base=BASE, precision=precision)
    parts = [
        merge.information(BASE, checkpoint.load_patch(f)[0], checkpoint.load_precision(f))
        for f in (tmp_path / f"{i}" for i in range(3))
    ]
    left = merge.resolve(BASE, merge.subtract(merge.add(*parts), parts[1]), prior=0.1)
    never = merge.resolve(BASE, merge.add(parts[0], parts[2]), prior=0.1)
    assert set(left) == set(never) == {"a.w"}
    np.testing.assert_array_equal(left["a.w"].indices, never["a.w"].indices)
    np.testing.assert_array_equal(
        left["a.w"].values, never["a.w"].values
    )  # equal to 1e-12, then rounded once
    merged = merge.resolve(BASE, merge.add(*parts), prior=0.1)
    assert set(merged) == {"a.w", "c"} and merged["a.w"].indices.size > left["a.w"].indices.size


def test_what_cannot_be_resolved_is_told():
    known = {"c": merge.Evidence(np.array([1, 19]), np.array([1.0, 2.0]), np.array([3.0, 4.0]))}
    for options, wrong in (
        ({"prior": np.nan}, "`prior` must be a finite number"),
        ({"prior": -1.0}, "`prior` must be"),
        ({"prior": {**BASE, "c": np.full((5, 4), -1.0)}}, "`prior` must be finite and >= 0; `c` is not"),
        ({"floor": np.nan}, "`floor` must be a finite number"),
        ({"floor": -1}, "`floor` must be"),
        ({"normalize": lambda name: np.nan}, r"`normalize\(`c`\)` must be a finite number"),
    ):
        with pytest.raises(errors.UsageError, match=wrong):
            merge.resolve(BASE, known, **options)
    for prior in ({"a": BASE["a"]}, {"c": np.ones(2)}, {"c": np.ones(20)}, {"c": 1.0}):
        with pytest.raises(errors.StructureError, match=r"`c` is .* in `prior`; wanted \[5, 4\]"):
            merge.resolve(BASE, known, prior=prior)
    with pytest.raises(errors.StructureError, match="does not have"):
        merge.resolve(BASE, {"c": known["c"]._replace(indices=np.array([-1, 3]))})
    want = merge.resolve(BASE, known, prior=2.0)["c"].values
    for two in (2, np.float32(2), np.array(2), jnp.asarray(2.0)):
        np.testing.assert_array_equal(merge.resolve(BASE, known, prior=two)["c"].values, want)
    assert merge.resolve(BASE, {"c": merge.Evidence(*np.zeros((3, 0), int))})["c"].indices.size == 0


def test_negative_precision_has_no_ancestor():
    good, bad = ({"w": merge.Evidence(np.array([3]), np.array([p]), np.array([1.0]))} for p in (1.0, -1.0))
    for parts, wrong in (
        ((bad, good, good), "`a`"),
        ((good, bad, good), "`b`"),
        ((good, good, bad), "`ancestor`"),
    ):
        with pytest.raises(errors.UsageError, match=f"{wrong} has a precision of `w` that is negative"):
            merge.three_way(*parts)


def test_a_shift_is_not_left_behind():
    one = lambda shift: {"w": merge.Evidence(np.array([3]), np.array([2.0]), np.array([shift]))}
    assert merge.subtract(one(1.5), one(1.5)) == merge.subtract(merge.add(one(1.5)), one(1.5)) == {}
    for whole in (one(1.5), merge.add(one(1.5))):
        with pytest.raises(errors.UsageError, match="never added: of `w` a shift would be left"):
            merge.subtract(whole, one(1.0))


def test_what_has_no_precision_is_refused():
    ones = {"a": {"w": np.ones((6, 8)), "b": np.ones(8)}}
    with pytest.raises(errors.UsageError, match=r"LowRank.*no diagonal"):
        merge.information(BASE, _low_rank(1), ones)
    with pytest.raises(errors.UsageError, match="finite and >= 0"):
        merge.information(BASE, _sparse(1), {"a": {"w": -np.ones((6, 8))}})
    with pytest.raises(errors.StructureError, match=r"no leaf `a\.w`"):
        merge.information(BASE, _sparse(1), {"c": np.ones(2)})
    with pytest.raises(errors.StructureError, match="has 7 entries"):
        merge.information(BASE, _sparse(1), {"a": {"w": np.ones(7)}})
    with pytest.raises(errors.UsageError, match="never added"):
        merge.subtract(_evidence(1), merge.add(_evidence(1), _evidence(1)))
    with pytest.raises(errors.StructureError, match="does not have"):
        merge.resolve({"w": np.zeros(3)}, {"w": merge.Evidence(np.array([3]), np.ones(1), np.ones(1))})
