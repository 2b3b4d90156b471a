"""Un-folded leaves against folded weights: every way in which layers use a weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fishjax import leaves, models, patches, tree
from fishjax.errors import StructureError

pytestmark = pytest.mark.usefixtures("quick")

D, H, K = 4, 3, 2  # width, heads, head size
X = np.random.default_rng(0).normal(size=(5, D))
Y = np.random.default_rng(1).normal(size=(5, H, K))


@jax.custom_vjp
def doubled_gradient(x):
    return jnp.sin(x)


doubled_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


# name -> (function of (w, x), shape of w, input axes of w)
USES = {
    "matmul": (lambda w, x: x @ w, (D, K), (0,)),
    "matmul_in_jit": (lambda w, x: jax.jit(lambda w: x @ w)(w), (D, K), (0,)),
    "vector": (lambda w, x: x[0] @ w, (D, K), (0,)),
    "transposed": (lambda w, x: x @ w.T, (K, D), (1,)),
    "weight_on_the_left": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x[None], w), (D, H, K), (0,)),
    "heads": (lambda w, x: jnp.einsum("td,dhk->thk", x, w), (D, H, K), (0,)),
    "heads_out": (lambda w, x: jnp.einsum("thk,hkd->td", Y, w), (H, K, D), (0, 1)),
    "one_contracted_of_two": (lambda w, x: jnp.einsum("thk,hkd->thd", Y, w), (H, K, D), (1,)),
    "cast": (lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32), (D, K), (0,)),
    "reshaped": (lambda w, x: x @ w.reshape(D, K), (D, K // 2, 2), (0,)),
    "split_heads": (lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(D, H, K)), (D, H * K), (0,)),
    "sliced": (lambda w, x: x @ w[1], (2, D, K), (1,)),
    "strided": (lambda w, x: x[:, :2] @ w[::2], (D, K), (0,)),
    "dynamically_sliced": (
        lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.argmin(x[0]), 0, False),
        (4, D, K),
        (1,),
    ),
    "split": (lambda w, x: [x @ v for v in jnp.split(w, 3, axis=1)], (D, 3 * K), (0,)),
    "expanded": (lambda w, x: jnp.einsum("btd,bdk->btk", x[None], w[None]), (D, K), (0,)),
    "batch_axis": (lambda w, x: jax.vmap(lambda v: x @ v)(w), (3, D, K), (1,)),
    "remat": (lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x), (D, K), (0,)),
    "cond": (lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * x @ w, w), (D, K), (0,)),
    "scanned": (lambda w, x: lax.scan(lambda h, v: (jnp.tanh(h @ v), h), x, w), (3, D, D), (1,)),
    "scan_constant": (
        lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), h), x, None, length=3),
        (D, D),
        (0,),
    ),
    "embedding": (lambda w, x: jnp.take(w, jnp.array([[1, 1], [0, 3]]), axis=0), (5, D), (0,)),
    "in_vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (D, K), (0,)),
    "beside_custom_vjp": (lambda w, x: doubled_gradient(x @ w), (D, K), (0,)),
    "beside_custom_jvp": (lambda w, x: jax.nn.gelu(x @ w), (D, K), (0,)),
    "beside_while": (
        lambda w, x: lax.while_loop(lambda y: y.sum() < 1, lambda y: y + 1, x)[0] @ w,
        (D, K),
        (0,),
    ),
}
KINDS = ("outputs", "inputs", "low_rank")


def patch_of(kind, shape, inputs):
    rng = np.random.default_rng(2)
    on_inputs = [n if d in inputs else 1 for d, n in enumerate(shape)]
    on_outputs = [1 if d in inputs else n for d, n in enumerate(shape)]
    if kind == "low_rank":
        a, b = (jnp.array(rng.normal(size=(*s, 2))) for s in (on_inputs, on_outputs))
        return {"w": patches.LowRank(a, b, scale=0.5)}
    return {"w": patches.Scale(jnp.array(rng.normal(size=on_inputs if kind == "inputs" else on_outputs)))}


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_unfolded_is_folded_and_forms_no_weight(x64, use, kind):
    fn, shape, inputs = USES[use]
    call = lambda params, x: fn(params["w"], x)
    params = {"w": jnp.array(np.random.default_rng(3).normal(size=shape))}
    patch = patch_of(kind, shape, inputs)
    tolerance = 1e-5 if use == "cast" else 1e-12
    unfolded = patches.unfolded(call)
    assert patches.unfolded_report(call)(params, patch, X) == []

    def loss(patch, f):
        out = f(patch)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out)), out

    gradient, out = jax.grad(loss, has_aux=True)(patch, lambda p: call(patches.apply(params, p), X))
    close(unfolded(params, patch, X), out, tolerance)
    mapped = jax.jit(jax.vmap(jax.grad(lambda p: loss(p, lambda p: unfolded(params, p, X)), has_aux=True)))
    got, got_out = jax.tree.map(lambda y: y[0], mapped(jax.tree.map(lambda x: x[None], patch)))
    close(got_out, out, tolerance)
    close(got, gradient, 10 * tolerance)


@pytest.mark.parametrize("use", ["embedding", "sliced", "split_heads", "scanned"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_may_be_numpy_arrays_as_a_file_gives_them(x64, use, kind):
    fn, shape, inputs = USES[use]
    call = lambda params, x: fn(params["w"], x)
    params = {"w": np.random.default_rng(3).normal(size=shape)}
    patch = patch_of(kind, shape, inputs)
    got = patches.unfolded(call)(params, jax.tree.map(np.asarray, patch), X)
    close(got, call(patches.apply(params, patch), X), 1e-12)


def test_a_factor_that_cannot_be_kept_folds_and_is_reported(x64):
    w, v = jnp.arange(12.0).reshape(3, 4), jnp.arange(12.0).reshape(3, 4)
    params, patch = {"w": w}, {"w": patches.Scale(v)}
    joint = lambda params, x: x @ params["w"]  # the factor mixes inputs and outputs
    close(patches.unfolded(joint)(params, patch, jnp.ones(3)), jnp.ones(3) @ (w * v), 1e-14)
    assert patches.unfolded_report(joint)(params, patch, jnp.ones(3)) == ["w: dot_general"]
    summed = lambda params: jnp.sum(params["w"] ** 2) + jnp.sum(params["w"] @ params["w"].T)
    close(patches.unfolded(summed)(params, patch), summed({"w": w * v}), 1e-10)


def test_other_kinds_and_tied_biases_are_folded(x64):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "n": jnp.ones(3)}
    patch = {
        "w": patches.Scale(jnp.arange(4.0)[None], tied=(("b", (4,)),)),
        "n": patches.Dense(jnp.full(3, 7.0)),
    }
    fn = lambda p, x: (x * p["n"]) @ p["w"] + p["b"]
    close(
        patches.unfolded(fn)(params, patch, jnp.ones(3)), fn(patches.apply(params, patch), jnp.ones(3)), 1e-14
    )


def test_bfloat16_weights_keep_float32_factors():
    w = jnp.array(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    scale = jnp.array(np.random.default_rng(1).normal(size=(1, 32)), jnp.float32)
    x = jnp.array(np.random.default_rng(2).normal(size=(8, 64)), jnp.bfloat16)
    y = patches.unfolded(lambda p, x: x @ p["w"])({"w": w}, {"w": patches.Scale(scale)}, x)
    assert y.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) @ (np.asarray(w, np.float64) * np.asarray(scale, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2**-7 * np.abs(want).max())


def test_what_is_no_array_reaches_the_function_as_it_is():
    def fn(params, x, mode, *, twice=False):
        assert mode == "plain" and twice is True and isinstance(twice, bool)
        return 2 * (x @ params["w"])

    params, patch = {"w": jnp.ones((2, 2))}, {"w": patches.Scale(jnp.ones((1, 2)))}
    assert patches.unfolded(fn)(params, patch, jnp.ones(2), "plain", twice=True).tolist() == [4.0, 4.0]


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(StructureError, match="`v`"):
        patches.unfolded(lambda p: p)({"w": jnp.ones(2)}, {"v": patches.Dense(jnp.ones(2))})


class Block(nn.Module):
    """Attention and a feed-forward layer, as a scan step."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(256, name="up")(x))), None


def linen(remat, scan):
    block = nn.remat(Block) if remat else Block

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if scan:
                stack = nn.scan(block, {"params": 0}, split_rngs={"params": True}, length=3)
                return stack(name="layers")(x, None)[0]
            for i in range(3):
                x, _ = block(name=f"layer_{i}")(x)
            return x

    return Model()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_linen_layers_train_a_patch_without_a_weight_gradient(remat, scan, key):
    model = linen(remat, scan)
    x = jax.random.normal(key, (32, 64))
    params = model.init(key, x)["params"]
    lead = 1 if scan else 0
    patch = {
        n: patches.Scale(jnp.ones([1] * (w.ndim - 2) + [w.shape[-2], 1]))
        for n, w in tree.flatten(params).items()
        if "down.kernel" in n
    }
    low = {"targets": {r"(query|value)\.kernel": lead}, "rank": 2}
    if not scan:
        patch |= patches.init_lora(key, params, **low)
    call = lambda params, x: jnp.sum(jnp.sin(model.apply({"params": params}, x)))
    loss_unfolded = lambda patch: patches.unfolded(call)(params, patch, x)
    loss_folded = lambda patch: call(patches.apply(params, patch), x)
    got, want = jax.jit(jax.grad(loss_unfolded))(patch), jax.jit(jax.grad(loss_folded))(patch)
    close(got, want, 2e-4)
    assert patches.unfolded_report(call)(params, patch, x) == []

    def flops(f, at):
        return jax.jit(f).lower(at).compile().cost_analysis()["flops"]

    full = flops(jax.value_and_grad(lambda params: call(params, x)), params)
    assert flops(jax.value_and_grad(loss_unfolded), patch) < (0.77 if remat else 0.70) * full


@pytest.mark.parametrize("remat", [False, True])
def test_a_t5_trains_a_patch_for_two_thirds_of_the_full_gradient(remat, key):
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    model = models.build({"model_type": "t5", **sizes, "feed_forward_proj": "gated-gelu"})
    params = jax.eval_shape(model.init, key)
    ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    each = jax.vmap(models.example_loss(models.remat(model) if remat else model), (None, 0))
    loss = lambda params, batch: each(params, batch).mean()
    under = lambda patch, params, batch: patches.unfolded(loss)(params, patch, batch)

    def flops(loss, *at):
        # Only lowered: nothing is compiled or run, and no compiler has taken away what remat asks for twice.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            lowered = jax.jit(jax.value_and_grad(loss)).lower(*at, {"input_ids": ids, "labels": ids})
        return lowered.cost_analysis()["flops"]

    full = flops(loss, params)
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    low_rank = patches.init_lora(key, like, rank=2, targets="paper")
    for patch in (patches.init_ia3(like, targets="paper"), low_rank):
        assert flops(under, patch, params) < (0.77 if remat else 0.70) * full


def test_interpret_costs_nothing_on_plain_arrays():
    f = lambda w, x: jnp.tanh(x @ w)
    assert leaves.interpret(f)(jnp.eye(2), jnp.ones(2)).tolist() == f(jnp.eye(2), jnp.ones(2)).tolist()
