"""The one-pass Fisher against the reference: layers of every kind, and random programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from fishjax import fisher, models, tree
from fishjax.fisher import _auto, _one_pass, _scores, _squares

pytestmark = pytest.mark.usefixtures("quick")

B, T, D = 3, 5, 4
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # compiling is what costs


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@jax.custom_vjp
def own_matmul(x, w):
    return x @ w


own_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, 3 * xw[0].T @ g))


@jax.custom_jvp
def own_product(x, w):
    return x @ w


own_product.defjvp(lambda xw, d: (xw[0] @ xw[1], d[0] @ xw[1] + 3 * xw[0] @ d[1]))

# An operation takes a tensor h `[T, D]`, ids `[T]` and a way to get a parameter of a shape, which may
# be one that was used before; it gives another h.


def norm(h, w):
    return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 0.1) * w[None]


def conv(h, k):
    groups = {"feature_group_count": D // k.shape[1]}
    return lax.conv_general_dilated(h.T[None], k, (1,), "SAME", **groups)[0].T


def conv_of_image(h, k):
    """Every other row of an image of T by 2 pixels with two channels."""
    kinds = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = lax.conv_general_dilated(h.reshape(1, T, 2, 2), k, (2, 1), "SAME", **kinds)
    return jnp.pad(y.reshape(3, D), ((0, 2), (0, 0)))


def attend(h, q, o):
    heads = jnp.einsum("td,dhk->thk", h, q)
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", heads, heads))
    return jnp.einsum("hts,shk,hkd->td", weights, heads, o)


def steps(h, w, b):
    def step(h, wb):
        return jnp.tanh(h @ wb[0] + wb[1][None]), h.sum()

    h, sums = lax.scan(step, h, (w, b))
    return h + sums.sum()


def reused(h, w):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=3)[0]


def reused_in_two_scans(h, w):
    inner = lambda h: lax.scan(lambda h, _: (jnp.tanh(h @ w.T), None), h, None, length=2)[0]
    return lax.scan(jax.checkpoint(lambda h, _: (inner(h @ w), None)), h, None, length=2)[0]


def fori(h, w):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]), h)


def counted(h, w):
    """A loop that gives an integer has no gradient, though the weight says how often it runs."""
    more = lambda n: n.astype(h.dtype) < 9 * jnp.abs(w).sum()
    steps = lax.while_loop(more, lambda n: n + jnp.where(w[0, 0] > 0, 1, 2).astype(n.dtype), jnp.int32(0))
    return h @ w + jnp.sin(steps.astype(h.dtype))


def either(h, w):
    return lax.cond(h[0, 0] > 0, lambda w: jnp.tanh(h @ w), lambda w: h * 2, w)


def carried(h, w):
    return lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (h, w), None, length=2)[0][0]


def dense(h, w, b):
    return jnp.tanh(h @ w + b[None])


def scalar_part(h, w):
    return h * jnp.where(w[0, 0] > 0, w[0, 0], w[1, 1])


OPERATIONS = {
    "dense": lambda h, ids, p: h @ p(D, D) + p(D)[None],
    "dense_transposed": lambda h, ids, p: h @ p(D, D).T,
    "dense_on_the_left": lambda h, ids, p: (p(D, D) @ h.T).T,
    "dense_cast": lambda h, ids, p: (h.astype(jnp.float32) @ p(D, D).astype(jnp.float32)).astype(h.dtype),
    "dense_reshaped": lambda h, ids, p: h @ p(2, 2, D).reshape(D, D),
    "dense_of_slice": lambda h, ids, p: h @ p(3, D, D)[1],
    "dense_of_two_slices": lambda h, ids, p: (h @ p(3, D, D)[0]) @ p(3, D, D)[2],
    "dense_of_strides": lambda h, ids, p: h @ p(2 * D, D)[::2] + h @ p(2 * D, D)[1::2],
    "dense_dynamic": lambda h, ids, p: h @ lax.dynamic_index_in_dim(p(3, D, D), ids[0] % 3, 0, False),
    "dense_split": lambda h, ids, p: sum(jnp.tanh(h @ w) for w in jnp.split(p(D, 3 * D), 3, 1)),
    "dense_stacked": lambda h, ids, p: jax.vmap(lambda w: h @ w)(p(3, D, D)).sum(0),
    "dense_normalised": lambda h, ids, p: h @ jnp.tanh(p(D, D)),
    "dense_of_product": lambda h, ids, p: h @ (p(D, D) @ p(D, D).T),
    "dense_in_jit": lambda h, ids, p: jax.jit(lambda h, w: jnp.tanh(h @ w))(h, p(D, D)),
    "dense_in_remat": lambda h, ids, p: jax.checkpoint(dense)(h, p(D, D), p(D)),
    "dense_in_custom_vjp": lambda h, ids, p: own_matmul(h, p(D, D)),
    "dense_in_custom_jvp": lambda h, ids, p: own_product(h, p(D, D)),
    "dense_of_one_token": lambda h, ids, p: h + (h[0] @ p(D, D))[None],
    "square_and_shared": lambda h, ids, p: (h @ p(D, D)) @ p(D, D) + p(D, D).sum(),
    "stop_gradient": lambda h, ids, p: h @ p(D, D) + lax.stop_gradient(p(D, D)).sum(),
    "compared": lambda h, ids, p: jnp.where(p(D)[None] > 0, h, 2 * h) + p(D)[None],
    "fourier": lambda h, ids, p: h * jnp.abs(jnp.fft.fft(p(D)))[None],
    "complex": lambda h, ids, p: jnp.real(h.astype(complex) @ lax.complex(p(D, D), p(D, D))),
    "barrier": lambda h, ids, p: h @ lax.optimization_barrier((p(D, D), p(D)))[0],
    "norm": lambda h, ids, p: norm(h, p(D)) + p(D)[None],
    "scalar_part": lambda h, ids, p: scalar_part(h, p(D, D)),
    "embed": lambda h, ids, p: h + jnp.take(p(6, D), ids, axis=0),
    "embed_clipped": lambda h, ids, p: h + jnp.take(p(6, D), ids + 3, axis=0, mode="clip"),
    "embed_dropped": lambda h, ids, p: h + p(6, D).at[ids + 3].get(mode="fill", fill_value=0),
    "embed_columns": lambda h, ids, p: h + p(D, 6)[:, ids].T,
    "embed_positions": lambda h, ids, p: h + p(8, D)[:T],
    "embed_constant": lambda h, ids, p: h + p(6, D)[jnp.array([0, 1, 1, 5, 2])],
    "embed_tied": lambda h, ids, p: h + jax.nn.softmax(h @ p(6, D).T) @ p(6, D) + p(6, D)[ids],
    "attend": lambda h, ids, p: attend(h, p(D, 2, 2), p(2, 2, D)),
    "conv": lambda h, ids, p: conv(h, p(D, D, 3)),
    "conv_in_groups": lambda h, ids, p: conv(h, p(D, D // 2, 3)),
    "conv_of_image": lambda h, ids, p: conv_of_image(h, p(3, 2, 2, 2)),
    "scan": lambda h, ids, p: steps(h, p(3, D, D), p(3, D)),
    "scan_in_remat": lambda h, ids, p: jax.checkpoint(steps)(h, p(3, D, D), p(3, D)),
    "scan_constant": lambda h, ids, p: reused(h, p(D, D)),
    "scan_constant_twice": lambda h, ids, p: reused_in_two_scans(h, p(D, D)),
    "scan_carry": lambda h, ids, p: carried(h, p(D, D)),
    "fori": lambda h, ids, p: fori(h, p(3, D, D)),
    "while_of_integers": lambda h, ids, p: counted(h, p(D, D)),
    "cond": lambda h, ids, p: either(h, p(D, D)),
    "gelu": lambda h, ids, p: jax.nn.gelu(h),
    "custom_vjp": lambda h, ids, p: doubled(h),
    "untouched": lambda h, ids, p: (p(D, D), h)[1],
}  # fmt: skip


class Params:
    """Hands parameters out by shape, sometimes one that was handed out before."""

    def __init__(self, share, values=None):
        self.share, self.values, self.by_shape, self.calls = iter(share), values, {}, 0
        self.made = {}

    def __call__(self, *shape):
        used = self.by_shape.setdefault(shape, [])
        if not used or not next(self.share, False):
            name = f"p{len(self.made)}"
            rng = np.random.default_rng(len(self.made))
            self.made[name] = (
                jnp.asarray(rng.normal(size=shape) / 2) if self.values is None else self.values[name]
            )
            used.append(name)
        return self.made[used[-1]]


def program(operations, share, read=lambda h: jnp.sum(jnp.sin(h)) + jnp.sum(h[0]) ** 2):
    """Return a loss (or what `read` makes) of a sequence of operations, and its parameters."""

    def run(params, example):
        h = jnp.asarray(example["h"])
        for name in operations:
            h = h / 2 + OPERATIONS[name](h, example["ids"], params)
        return read(h)

    def loss(params, example):
        return run(Params(share, params), example)

    first = Params(share)
    run(first, jax.tree.map(lambda x: jnp.asarray(x[0]), batch()))
    return loss, first.made


def batch():
    rng = np.random.default_rng(7)
    return {"h": rng.normal(size=(B, T, D)), "ids": rng.integers(0, 6, (B, T)).astype(np.int32)}


def compare(fn, params, batch, tolerance=1e-10, chunk_size=3, estimator=fisher.empirical):
    """Assert 1e-10 relative error in each parameter; single precision inside a program allows for more."""
    total = {}
    for method, chunk in (("reference", 1), ("one_pass", chunk_size)):
        made = estimator(fn, method=method, chunk_size=chunk)
        update = jax.jit(made.update, compiler_options=QUICK)
        total[method] = update(made.init(params), params, batch).total
    want, got = tree.flatten(total["reference"]), tree.flatten(total["one_pass"])
    for name, f in want.items():
        assert got[name].dtype == f.dtype and bool(jnp.all(got[name] >= 0)), name
        scale = float(jnp.abs(f).max())
        np.testing.assert_allclose(got[name], f, rtol=0, atol=tolerance * scale + 1e-280, err_msg=name)


def ways(loss, params, batch):
    return {w.name: w.how for w in _one_pass.plan(loss, params, jax.tree.map(lambda x: x[0], batch))[1]}


@pytest.fixture
def limits(monkeypatch):
    """Set what decides between the ways, so that tiny programs take those of large ones."""

    def set_to(copied=_one_pass.MOST_COPIED, few=0, held=2**16):
        monkeypatch.setattr(_one_pass, "MOST_COPIED", copied)
        monkeypatch.setattr(_one_pass, "FEW", few)
        monkeypatch.setitem(_squares.HELD, "cpu", held)

    return set_to


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation(x64, limits, operation, shared):
    limits()
    loss, params = program(["gelu", operation, "dense"], share=[shared] * 9)
    compare(loss, params, batch(), 1e-5 if "cast" in operation else 1e-10)


@pytest.mark.parametrize(
    "operation", ["dense", "embed", "embed_tied", "scan", "attend", "scan_constant", "conv"]
)
def test_examples_one_at_a_time_in_groups_and_beside_padding(x64, limits, operation):
    limits(held=1)
    loss, params = program([operation, "dense"], share=[])
    compare(loss, params, batch(), chunk_size=3)
    limits(held=40)
    compare(loss, params, batch(), chunk_size=2)


@pytest.mark.parametrize(
    "operations",
    [
        [
            "embed",
            "embed_constant",
            "gelu",
        ],  # a lookup that is the same for every example beside one that is not
        ["embed_clipped", "embed_dropped"],
        ["embed_constant", "embed_tied", "embed"],
        ["dense", "scan_constant", "dense_transposed"],
        ["barrier", "dense_of_product"],
    ],
)
def test_shared_parameters(x64, limits, operations):
    limits()
    loss, params = program(operations, share=[True] * 9)
    compare(loss, params, batch())


@pytest.mark.parametrize(
    "operations, at_once",
    [
        (["embed_tied", "dense", "scan_constant"], 1),
        (["embed_tied", "dense", "scan_constant"], 2),
        (["embed_tied", "attend", "scan_constant"], 8),
        (["cond", "conv", "scan", "untouched"], 8),
    ],
)
def test_rows_go_backward_together(x64, limits, monkeypatch, operations, at_once):
    """Three rows in one, two (one of them half empty) and three backward passes."""
    limits()
    monkeypatch.setattr(_one_pass, "MOST_ROWS_AT_ONCE", at_once)
    run, params = program(operations, share=[True, False] * 4, read=lambda h: jnp.sin(h).mean(0)[:4])
    compare(run, params, batch(), estimator=fisher.exact)


ROOM = st.sampled_from([(2**22, 0, 2**16), (2**22, 2**14, 1), (8, 0, 40), (8, 2**14, 2**16)])


@given(
    st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=5),
    st.lists(st.booleans(), max_size=8),
    ROOM,
)
def test_random_programs(operations, share, room):
    """Silently wrong is impossible: shared, sliced, cast, scanned parameters in any mixture."""
    before = _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"]
    _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"] = room
    try:
        with jax.enable_x64(True):
            loss, params = program(operations, share)
            if params:
                compare(loss, params, batch(), 1e-4 if "dense_cast" in operations else 1e-9)
    finally:
        _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"] = before


def encoder(layers=2, d=32, heads=2, vocabulary=500, classes=3):
    """A BERT-shaped classifier in plain JAX, float32, and a batch of 6 examples of 16 tokens."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)
    layer = lambda: {
        **{n: normal(d, heads, d // heads) for n in "qkv"},
        **{f"{n}_bias": normal(heads, d // heads) for n in "qkv"},
        "o": normal(heads, d // heads, d),
        "o_bias": normal(d),
        "up": normal(d, 4 * d),
        "down": normal(4 * d, d),
        "norm1": 1 + normal(d),
        "norm2": 1 + normal(d),
    }
    params = {
        "token": normal(vocabulary, d),
        "position": normal(64, d),
        **{f"layer{i}": layer() for i in range(layers)},
        "head": normal(d, classes),
    }

    def logits(params, example):
        ids = example["ids"]
        x = jnp.take(params["token"], ids, axis=0) + params["position"][: ids.shape[0]]
        for i in range(layers):
            w = params[f"layer{i}"]
            q, k, v = (jnp.einsum("td,dhk->thk", x, w[n]) + w[f"{n}_bias"][None] for n in "qkv")
            a = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k) * (d // heads) ** -0.5)
            x = norm(x + jnp.einsum("hts,shk,hkd->td", a, v, w["o"]) + w["o_bias"][None], w["norm1"])
            x = norm(x + jax.nn.gelu(x @ w["up"]) @ w["down"], w["norm2"])
        return x[0] @ params["head"]

    batch = {"ids": rng.integers(0, vocabulary, (6, 16)), "y": rng.integers(0, classes, 6)}
    return logits, params, jax.tree.map(lambda x: x.astype(np.int32), batch)


def test_an_encoder_in_float32_agrees_in_norm_and_in_its_mask():
    logits, params, batch = encoder()
    loss = lambda p, e: -jax.nn.log_softmax(logits(p, e))[e["y"]]
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(fisher.estimate(estimator, params, [batch]))])
        for estimator in (
            fisher.empirical(loss, method="reference", chunk_size=1),
            fisher.empirical(loss, method="one_pass", chunk_size=4),
        )
    ]
    assert np.linalg.norm(flat[0] - flat[1]) <= 1e-6 * np.linalg.norm(flat[0])
    kept = [set(np.argsort(-f, kind="stable")[: round(0.005 * f.size)]) for f in flat]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("make", [fisher.exact, fisher.sampled])
def test_exact_and_sampled_go_through_one_pass(make, key):
    logits, params, batch = encoder(layers=1)
    results = [
        fisher.estimate(make(logits, method=m, chunk_size=c), params, [batch], key=key)
        for m, c in (("reference", 2), ("one_pass", 4))
    ]
    total = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(results[0]))
    apart = sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, results), strict=True))
    assert apart <= 1e-12 * total


def test_half_precision_squares_in_float32():
    logits, params, batch = encoder(layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    estimators = [fisher.exact(logits, method=m) for m in ("reference", "one_pass")]
    want, got = (tree.flatten(fisher.estimate(e, params, [batch])) for e in estimators)
    for name in want:
        assert got[name].dtype == jnp.float32
        if name.endswith("k_bias"):  # a softmax is blind to it: its Fisher is 0, and the rest is rounding
            continue
        scale = float(jnp.linalg.norm(want[name]))
        assert float(jnp.linalg.norm(got[name] - want[name])) <= 0.05 * scale + 1e-12, name


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


def test_attention_of_linen(x64):
    """Normalised keys: without, a softmax is blind to the keys' bias, whose Fisher is only rounding."""
    model = nn.MultiHeadDotProductAttention(2, qkv_features=8, normalize_qk=True, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D))
    loss = lambda p, x: jnp.sum(jnp.sin(model.apply({"params": p}, x)))
    with jax.numpy_dtype_promotion("standard"):  # Linen mixes dtypes of its own
        shapes = jax.eval_shape(model.init, jax.random.key(0), x[0])["params"]
        params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
        assert set(ways(loss, params, x).values()) == {"in place"}
        compare(loss, params, x)


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


def test_many_classes_of_a_wide_layer_are_exact_in_float32():
    """XLA on a CPU once fused the sum over rows of small leaves into wrong numbers, only at such sizes."""
    model = models.build({"model_type": "fishjax_digits", "hidden_size": 96, "num_hidden_layers": 1})
    params = model.init(jax.random.key(0))
    batch = {"image": jax.random.uniform(jax.random.key(1), (64, 8, 8))}
    totals = {}
    for method in ("one_pass", "reference"):
        estimator = fisher.exact(
            lambda p, x: model.apply(p, {"image": x["image"][None]})[0], method=method, chunk_size=64
        )
        totals[method] = fisher.estimate(estimator, params, [batch])
    for name, want in tree.flatten(totals["reference"]).items():
        if "key.bias" not in name:  # exactly zero but for rounding
            error = jnp.linalg.norm(tree.flatten(totals["one_pass"])[name] - want) / jnp.linalg.norm(want)
            assert error < 1e-5, name
