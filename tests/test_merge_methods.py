"""Every merge method against its formula, written out naively in float64 numpy."""

import itertools

import numpy as np
import pytest

from fishjax import errors, merge

RNG = np.random.default_rng(0)
BASE = {"a": RNG.standard_normal((40, 30)), "b": {"c": RNG.standard_normal(77)}}
MODELS = [
    {
        "a": BASE["a"] + 0.1 * RNG.standard_normal((40, 30)),
        "b": {"c": BASE["b"]["c"] + 0.2 * RNG.standard_normal(77)},
    }
    for _ in range(3)
]
FISHERS = [{"a": RNG.random((40, 30)), "b": {"c": RNG.random(77)}} for _ in range(4)]


def _leaf(tree, name):
    return tree["a"] if name == "a" else tree["b"]["c"]


def _check(merged, want, **tolerance):
    for name in ("a", "c"):
        np.testing.assert_allclose(
            _leaf(merged, name), want(name), **({"rtol": 1e-12, "atol": 1e-14} | tolerance)
        )


def _taus(name, models=MODELS):
    return [_leaf(m, name) - _leaf(BASE, name) for m in models]


@pytest.mark.parametrize(
    "weights, scale, normalize", [(None, 0.3, False), ([1, -1, 0.5], 1.0, False), ([1, 2, 3], 1.0, True)]
)
def test_task_arithmetic(weights, scale, normalize):
    w = np.array(weights or [1, 1, 1], float)
    w = w / w.sum() if normalize else w
    merged = merge.task_arithmetic(MODELS, base=BASE, weights=weights, scale=scale, normalize=normalize)
    _check(merged, lambda n: _leaf(BASE, n) + scale * sum(a * t for a, t in zip(w, _taus(n), strict=True)))


def test_negation_takes_a_change_back():
    forth = merge.task_arithmetic(MODELS[:1], base=BASE)
    back = merge.task_arithmetic([forth, MODELS[0]], base=BASE, weights=[1, -1])
    _check(back, lambda n: _leaf(BASE, n))


def test_wise_ft_path():
    for alpha in (0.0, 0.3, 1.0):
        merged = merge.wise_ft(MODELS[:1], base=BASE, alpha=alpha)
        _check(merged, lambda n, a=alpha: (1 - a) * _leaf(BASE, n) + a * _leaf(MODELS[0], n))
    np.testing.assert_array_equal(merged["a"], MODELS[0]["a"])
    with pytest.raises(errors.UsageError, match=r"`alpha`.*\[0, 1\]"):
        merge.wise_ft(MODELS[:1], base=BASE, alpha=1.1)
    with pytest.raises(errors.UsageError, match="one fine-tuned"):
        merge.wise_ft(MODELS, base=BASE, alpha=0.5)


def _trim(taus, cuts):
    return [np.where(abs(t) >= c, t, 0) for t, c in zip(taus, cuts, strict=True)]


def _disjoint_mean(taus, w):
    sign = np.where(sum(a * t for a, t in zip(w, taus, strict=True)) >= 0, 1, -1)
    agree = [np.sign(t) == sign for t in taus]
    total = sum(a * t * g for a, t, g in zip(w, taus, agree, strict=True))
    return total / np.maximum(sum(a * g for a, g in zip(w, agree, strict=True)), 1e-30)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("density", [0.2, [0.5, 0.1, 1.0]])
def test_ties(scope, weights, density):
    ds = density if isinstance(density, list) else [density] * 3
    merged = merge.ties(MODELS, base=BASE, density=density, weights=weights, scope=scope, scale=0.7)

    def want(name):
        cuts = []
        for i, d in enumerate(ds):
            parts = [name] if scope == "tensor" else ["a", "c"]
            size = np.sort(np.concatenate([abs(_taus(p)[i]).ravel() for p in parts]))[::-1]
            cuts.append(size[int(d * size.size) - 1])
        return _leaf(BASE, name) + 0.7 * _disjoint_mean(_trim(_taus(name), cuts), weights or [1, 1, 1])

    _check(merged, want)


def test_ties_keeps_complex_changes_by_magnitude():
    changed = np.complex64([3 - 4j, 1 + 9j, -9j, 1e-3j])
    merged = merge.ties([{"w": changed}], base={"w": np.zeros(4, np.complex64)}, density=0.5)["w"]
    np.testing.assert_array_equal(merged, np.where(abs(changed) > 5, changed, 0))


@pytest.mark.parametrize("n", [255, 256, 300])
def test_ties_counts_more_models_than_a_byte(n):
    model, base = {"w": np.float32([3, -1, 0])}, {"w": np.float32([1, 1, 0])}
    np.testing.assert_array_equal(merge.ties([model] * n, base=base, density=1.0)["w"], model["w"])


def test_ties_of_a_single_entry_and_of_equal_models():
    assert merge.ties([{"w": np.float32([2])}] * 2, base={"w": np.float32([1])}, density=0.1)["w"] == 2
    merged = merge.ties([MODELS[0]] * 3, base=BASE, density=1.0)
    _check(merged, lambda n: _leaf(MODELS[0], n))


@pytest.mark.parametrize("elect", [False, True])
def test_breadcrumbs(elect):
    merged = merge.breadcrumbs(MODELS, base=BASE, density=0.6, gamma=0.1, elect=elect, normalize=elect)

    def want(name):
        kept = []
        for t in _taus(name):
            size = np.sort(abs(t).ravel())[::-1]
            top = int(0.1 * t.size)
            kept.append(np.where((abs(t) <= size[top]) & (abs(t) >= size[top + int(0.6 * t.size) - 1]), t, 0))
        return _leaf(BASE, name) + (_disjoint_mean(kept, [1, 1, 1]) if elect else sum(kept))

    _check(merged, want)


def test_breadcrumbs_of_a_small_leaf_drops_nothing_at_the_top():
    base, tuned = {"w": np.zeros(10)}, {"w": np.arange(1.0, 11)}  # gamma * 10 < 1
    assert merge.breadcrumbs([tuned], base=base, density=0.5)["w"].tolist() == [0.0] * 5 + [6, 7, 8, 9, 10]
    assert merge.breadcrumbs([tuned], base=base, density=0.9, gamma=0.5)["w"].tolist() == [*range(1, 10), 0]


@pytest.mark.parametrize("rescale", ["paper", "l1", None])
def test_dare(rescale):
    base, tuned = {"w": np.zeros(100_000)}, {"w": RNG.standard_normal(100_000)}
    got = merge.dare([tuned, tuned], base=base, density=[0.25, 1.0], weights=[1, 0], rescale=rescale, seed=3)[
        "w"
    ]
    kept = got != 0
    assert abs(kept.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 100_000)
    factor = {"paper": 4.0, "l1": abs(tuned["w"]).sum() / abs(tuned["w"][kept]).sum(), None: 1.0}[rescale]
    np.testing.assert_allclose(got[kept], factor * tuned["w"][kept], rtol=1e-12)


def test_dare_draws_are_independent_and_repeatable():
    zeros, ones = {n: np.zeros(50_000) for n in "vw"}, {n: np.ones(50_000) for n in "vw"}
    draw = lambda seed, models=(ones,): merge.dare(models, base=zeros, density=0.5, rescale=None, seed=seed)
    first = draw(0)
    np.testing.assert_array_equal(first["w"], draw(0)["w"])
    both = draw(0, (ones, ones))["w"]
    for other in (draw(1)["w"], first["v"], both - first["w"], np.roll(first["w"], 1)):
        assert abs(np.corrcoef(first["w"], other)[0, 1]) < 0.02
    bits = np.unpackbits(np.frombuffer(first["w"].astype(np.uint8).tobytes(), np.uint8)[:, None], axis=1)[
        :, -1
    ]
    runs = (bits[1:] != bits[:-1]).mean()
    assert abs(runs - 0.5) < 0.01


def test_dare_elects():
    merged = merge.dare(MODELS, base=BASE, density=1.0, elect=True, normalize=True)
    _check(merged, lambda n: _leaf(BASE, n) + _disjoint_mean(_taus(n), [1, 1, 1]))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_and_nuslerp(t):
    def arc(a, b):
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

    _check(merge.slerp(MODELS[:2], t=t), lambda n: arc(_leaf(MODELS[0], n), _leaf(MODELS[1], n)), rtol=1e-10)
    want = lambda n: _leaf(BASE, n) + arc(*_taus(n)[:2])
    _check(merge.nuslerp(MODELS[:2], base=BASE, t=t), want, rtol=1e-10)


def test_slerp_of_parallel_and_zero_leaves_is_the_chord():
    a, b = (
        {"w": np.float32([1, 2]), "z": np.float32([0, 0])},
        {"w": np.float32([2, 4]), "z": np.float32([1, 1])},
    )
    merged = merge.slerp([a, b], t=0.25)
    np.testing.assert_allclose(merged["w"], [1.25, 2.5])
    np.testing.assert_allclose(merged["z"], [0.25, 0.25])
    near = {"w": np.float32([1, 2.01])}
    np.testing.assert_allclose(merge.slerp([{"w": a["w"]}, near], t=0.5, compat="mergekit")["w"], [1, 2.005])
    with pytest.raises(errors.UsageError, match="two"):
        merge.slerp(MODELS, t=0.5)


def test_model_stock():
    merged = merge.model_stock(MODELS, base=BASE)

    def want(name):
        taus = _taus(name)
        cosine = np.mean(
            [
                (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
                for a, b in itertools.combinations(taus, 2)
            ]
        )
        t = max(0, 3 * cosine / (1 + 2 * cosine))
        return t * sum(_leaf(m, name) for m in MODELS) / 3 + (1 - t) * _leaf(BASE, name)

    _check(merged, want, rtol=1e-10)
    _check(merge.model_stock([MODELS[0]] * 2, base=BASE), lambda n: _leaf(MODELS[0], n))


def test_gradient_matching():
    w, floor = [1.0, 0.5, 2.0], 0.05
    merged = merge.gradient_matching(
        MODELS, base=BASE, fishers=FISHERS[:3], base_fisher=FISHERS[3], weights=w, floor=floor
    )

    def want(name):
        h0, hs = np.maximum(_leaf(FISHERS[3], name), floor), [_leaf(f, name) for f in FISHERS[:3]]
        whole = h0 + sum(a * h for a, h in zip(w, hs, strict=True))
        steps = [a * (h0 + h) / whole * t for a, h, t in zip(w, hs, _taus(name), strict=True)]
        return _leaf(BASE, name) + sum(steps)

    _check(merged, want)


@pytest.mark.parametrize(
    "method, options, wrong",
    [
        ("ties", {"density": 0.0}, "`density`"),
        ("ties", {"density": [0.5, 0.5]}, "got 2"),
        ("ties", {"density": 0.5, "scope": "layer"}, "`scope` must be one of 'global', 'tensor'"),
        ("ties", {"density": 0.5, "weights": [1, -1, 2]}, ">= 0"),
        ("dare", {"density": 0.5, "rescale": "l2"}, "`rescale`"),
        ("dare", {"density": 1.5}, "`density`"),
        ("task_arithmetic", {"weights": [1, -1, 0], "normalize": True}, "sum to zero"),
        ("task_arithmetic", {"scale": float("inf")}, "`scale`"),
        ("breadcrumbs", {"density": 0.5, "gamma": "x"}, "`gamma`"),
    ],
)
def test_bad_options(method, options, wrong):
    with pytest.raises(errors.UsageError, match=wrong):
        getattr(merge, method)(MODELS, base=BASE, **options)


def test_a_base_of_another_structure():
    with pytest.raises(errors.StructureError, match=r"only in the models: `b\.c`"):
        merge.task_arithmetic(MODELS, base={"a": BASE["a"]})
    with pytest.raises(errors.UsageError, match="`base` must be given"):
        merge.task_arithmetic(MODELS, base=None)
