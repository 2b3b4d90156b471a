"""Programs to take Fishers of, in one pass and by the reference: operations of every kind, and an encoder."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fishjax import fisher, tree
from fishjax.fisher import _one_pass, _squares

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


def set_limits(monkeypatch, copied=_one_pass.MOST_COPIED, few=0, held=2**16):
    """Set what decides between the ways, so that tiny programs take those of large ones."""
    monkeypatch.setattr(_one_pass, "MOST_COPIED", copied)
    monkeypatch.setattr(_one_pass, "FEW", few)
    monkeypatch.setitem(_squares.HELD, "cpu", held)


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
