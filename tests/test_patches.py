"""Each kind of patch against dense arithmetic in float64, and what a bad patch is told."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import masks, models, patches, tree
from fishjax.errors import StructureError, UsageError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"attn": {"k": {"kernel": (6, 2, 3), "bias": (2, 3)}}, "mlp": {"kernel": (6, 4), "bias": (4,)}}
    shapes |= {"ln": {"scale": (6,)}, "wte": {"weight": (5, 6)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def started(kind, dtype=jnp.float32):
    base = params(dtype)
    if kind == "dense":
        return patches.init_dense(base, "kernel")
    if kind == "sparse":
        return patches.init_sparse(base, masks.topk(jax.tree.map(jnp.abs, base), density=0.2))
    if kind == "bitfit":
        return patches.init_bitfit(base, always="mlp.kernel")
    if kind == "norms":
        return patches.init_norms(base)
    if kind == "prompt":
        return patches.init_prompt(base, ids=[4, 1])
    if kind == "rslora":
        ranks, alphas = {"attn": 3, "": 1}, {"mlp": 2.0, "": 4.0}
        return patches.init_lora(
            jax.random.key(1), base, rank=ranks, alpha=alphas, targets="kernel", rslora=True
        )
    if kind == "keys_values":
        return patches.init_ia3(base, targets={"attn.k.kernel": patches.KeysValues(-1, by_head=False)})
    if kind == "low_rank":
        return patches.init_lora(jax.random.key(1), base, rank=2, targets="kernel", alpha=3.0)
    if kind == "delta":
        scales = jnp.zeros(2, tree.wide_dtype(dtype))
        some = patches.Delta(jnp.arange(-9, 9, dtype=jnp.int8), scales, 2 * jnp.arange(18), block=9)
        return {
            "attn.k.kernel": some,
            "mlp.kernel": patches.Delta(jnp.arange(24, dtype=jnp.int8), scales, block=12),
        }
    return patches.init_ia3(base, targets={"attn.k": (-2, -1), "mlp.kernel": 0})


def moved(patch):
    """The patch with its trained numbers moved, as training would."""
    trainable, fixed = patches.partition(patch)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [x + jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return patches.combine(jax.tree.unflatten(treedef, leaves), fixed)


def test_low_rank_is_the_product_of_its_factors_in_float64(x64):
    base = params(jnp.float64)
    patch = moved(patches.init_lora(jax.random.key(1), base, rank=2, targets="kernel", alpha=3.0))
    new = patches.apply(base, patch)
    for name, out_shape in (("attn.k", (2, 3)), ("mlp", (4,))):
        kind = patch[f"{name}.kernel"]
        a, b = np.asarray(kind.a).reshape(6, 2), np.asarray(kind.b).reshape(-1, 2)
        node, old = new, base
        for part in name.split("."):
            node, old = node[part], old[part]
        expected = np.asarray(old["kernel"]) + 1.5 * (a @ b.T).reshape(6, *out_shape)
        np.testing.assert_allclose(node["kernel"], expected, rtol=1e-13)


def test_ranks_alphas_and_rslora_go_by_regex(key):
    base = params()
    patch = started("rslora")
    assert {n: k.a.shape[-1] for n, k in patch.items()} == {"attn.k.kernel": 3, "mlp.kernel": 1}
    assert patch["attn.k.kernel"].scale == 4 / 3**0.5 and patch["mlp.kernel"].scale == 2.0
    with pytest.raises(UsageError, match=r"no regex of `rank`.*mlp"):
        patches.init_lora(key, base, rank={"attn": 3}, targets="kernel")
    with pytest.raises(UsageError, match=r"`query` matches no leaf"):
        patches.init_lora(key, base, rank={"query": 3, "": 1}, targets="kernel")


def test_bitfit_and_norms_train_what_they_say_in_every_family():
    """A norm is a module without a matrix; what else is a vector is a bias."""
    for case in ("t5_v1_1", "bert", "bert_masked", "bloom", "gpt2", "qwen2", "qwen3", "gemma2"):
        params = models.load(FIXTURES / case)[1]
        flat = tree.flatten(params)
        module = lambda n: n.rpartition(".")[0]
        layers = {module(n) for n, x in flat.items() if x.ndim > 1}
        heads = {"cls.predictions.bias"}  # a bias by itself
        norms = {n for n in flat if module(n) not in layers} - heads
        assert set(patches.init_norms(params)) == norms, case
        biases = {n for n, x in flat.items() if n.endswith(("bias", "beta"))}
        if biases:
            assert set(patches.init_bitfit(params)) == biases
        else:
            with pytest.raises(UsageError, match="bias"):
                patches.init_bitfit(params)


def test_a_soft_prompt_is_rows_of_the_embedding_before_the_input():
    model, params = models.load(FIXTURES / "t5_v1_1")
    ids, batch = [60, 59], models.pad([[5, 9, 11], [4, 8]], model)
    batch["labels"] = np.array([[3, 1], [7, -100]], np.int32)
    patch = moved(patches.init_prompt(params, ids=ids, like=[5, 9]))
    assert patches.num_parameters(patch) == 2 * params["shared"]["weight"].shape[1]
    tuned = patches.apply(params, patch)
    rows = np.flatnonzero((tuned["shared"]["weight"] != params["shared"]["weight"]).any(axis=1))
    assert rows.tolist() == sorted(ids)
    longer = patches.prompted(batch, ids, causal=False)
    assert longer["input_ids"].tolist() == [[60, 59, 5, 9, 11], [60, 59, 4, 8, batch["input_ids"][1, 2]]]
    assert longer["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    got, plain = model.apply(tuned, longer), model.apply(params, longer)
    assert got.shape == model.apply(params, batch).shape and not np.allclose(got, plain)
    np.testing.assert_array_equal(model.apply(tuned, batch), model.apply(params, batch))  # no other text
    causal = patches.prompted({k: batch[k] for k in ("input_ids", "attention_mask")}, ids, causal=True)
    assert causal["labels"].tolist() == [[-100, -100, 5, 9, 11], [-100, -100, 4, 8, -100]]
    for odd in ({"ids": [5, 5]}, {"ids": []}, {"ids": [999]}, {"ids": [1], "like": [1, 2]}):
        with pytest.raises(UsageError, match="ids"):
            patches.init_prompt(params, **odd)
    with pytest.raises(UsageError, match="one embedding"):
        patches.init_prompt(params, ids=[1], table="weight$")


def test_low_rank_inputs_may_be_any_axes(key):
    base = {"o": jnp.ones((2, 3, 6)), "w": jnp.ones((4, 1))}
    patch = patches.init_lora(key, base, rank=3, targets={"o": (0, 1)})
    assert patch["o"].a.shape == (2, 3, 1, 3) and patch["o"].b.shape == (1, 1, 6, 3)
    patch = moved(patch)
    expected = 1 + np.einsum("hkr,or->hko", patch["o"].a[:, :, 0], patch["o"].b[0, 0]) / 3
    np.testing.assert_allclose(patches.apply(base, patch)["o"], expected, rtol=1e-5)
    with pytest.raises(UsageError, match="rank"):
        patches.init_lora(key, base, rank=2, targets="w")


def test_scale_multiplies_once_in_float32_and_shares_its_vector_with_the_bias():
    base = params(jnp.bfloat16)
    patch = moved(started("scale", jnp.bfloat16))
    assert set(patch) == {"attn.k.kernel", "mlp.kernel"}
    assert patches.num_parameters(patch) == 6 + 6
    new = patches.apply(base, patch)
    vector = np.asarray(patch["attn.k.kernel"].vector)[0]
    for leaf in ("kernel", "bias"):
        wide = np.asarray(base["attn"]["k"][leaf], np.float32) * vector
        np.testing.assert_array_equal(new["attn"]["k"][leaf], wide.astype(jnp.bfloat16))
    np.testing.assert_array_equal(new["mlp"]["bias"], base["mlp"]["bias"])


def test_sparse_keeps_masters_in_float32_and_writes_values_not_differences():
    base = {"w": jnp.ones(4, jnp.bfloat16)}
    patch = {"w": patches.Sparse(jnp.array([1, 3]), jnp.array([1.001, 2.0], jnp.float32))}
    new = patches.apply(base, patch)["w"]
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(new, np.float32), [1.0, 1.0, 1.0, 2.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("share", [0.02, 0.9])
def test_diff_recovers_every_bit(dtype, share, key):
    base = params(dtype)
    mask = masks.random(key, base, density=share)
    tuned = jax.tree.map(lambda x, m: jnp.where(m, -x - 1, x), base, mask)
    tuned["mlp"]["bias"] = tuned["mlp"]["bias"].at[0].set(-0.0)
    base["mlp"]["bias"] = base["mlp"]["bias"].at[0].set(0.0)
    patch = patches.diff(base, tuned)
    again = patches.apply(base, patch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again, tuned)
    assert np.signbit(np.asarray(again["mlp"]["bias"], np.float32)[0])
    kinds = {type(k) for k in patch.values()}
    assert (patches.Sparse in kinds) if share < 0.5 else (patches.Dense in kinds)


def test_diff_under_a_mask_keeps_the_base_elsewhere(key):
    base = params()
    mask = masks.random(key, base, density=0.3)
    tuned = jax.tree.map(lambda x: x + 1, base)
    again = patches.apply(base, patches.diff(base, tuned, mask=mask))
    expected = jax.tree.map(lambda x, y, m: jnp.where(m, y, x), base, tuned, mask)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_diff_of_equal_trees_is_empty_and_of_unequal_structure_an_error():
    assert patches.diff(params(), params()) == {}
    with pytest.raises(StructureError):
        patches.diff(params(), params(jnp.bfloat16))


def test_compose_goes_left_to_right():
    base = {"w": jnp.array([1.0, 2.0])}
    double = {"w": patches.Scale(jnp.array([2.0, 2.0]))}
    put = {"w": patches.Sparse(jnp.array([0]), jnp.array([5.0]))}
    np.testing.assert_array_equal(patches.compose(base, [put, double])["w"], [10.0, 4.0])
    np.testing.assert_array_equal(patches.compose(base, [double, put])["w"], [5.0, 4.0])


def test_only_inexact_leaves_are_trained():
    trainable, _ = patches.partition(started("sparse"))
    grads = jax.grad(lambda t: sum((x**2).sum() for x in jax.tree.leaves(t)))(trainable)
    assert all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"nope": patches.Dense(jnp.ones(2))}, "does not have"),
        ({"w": patches.Dense(jnp.ones(2))}, "float32\\[2\\]"),
        ({"w": patches.Sparse(jnp.array([3, 1]), jnp.ones(2))}, "strictly increasing"),
        ({"w": patches.Sparse(jnp.array([1, 1]), jnp.ones(2))}, "strictly increasing"),
        ({"w": patches.Sparse(jnp.array([1, 6]), jnp.ones(2))}, "6 entries"),
        ({"w": patches.Sparse(np.array([0, 2**63 - 1, -2, 3]), jnp.ones(4))}, "strictly increasing"),
        ({"w": patches.Sparse(jnp.array([-1, 1]), jnp.ones(2))}, "6 entries"),
        ({"w": patches.Sparse(np.array([1, 2**32 + 2]), jnp.ones(2))}, "6 entries"),
        ({"w": patches.Sparse(jnp.array([1, 2]), jnp.ones(3))}, "pair"),
        ({"w": patches.Scale(jnp.ones((3, 1)))}, "broadcast"),
        ({"w": patches.Scale(jnp.ones((2, 1)), tied=(("b", (2,)),))}, "tied"),
        ({"w": patches.LowRank(jnp.ones((2, 1, 2)), jnp.ones((1, 2, 2)))}, "span"),
        ({"w": patches.LowRank(jnp.ones((2, 1, 2)), jnp.ones((1, 3, 1)))}, "span"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(patch, message):
    with pytest.raises(StructureError, match=message):
        patches.apply({"w": jnp.ones((2, 3))}, patch)


def test_a_leaf_changed_twice_by_one_patch_is_refused():
    base = {"k": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    patch = patches.init_ia3(base, targets={"k": -1}) | patches.init_dense(base, "bias")
    with pytest.raises(StructureError, match=r"`k.bias` is changed by both"):
        patches.apply(base, patch)


def test_targets_that_do_not_fit_are_refused(key):
    base = {"wk": jnp.ones((2, 3)), "wv": jnp.ones((2, 3)), "bias": jnp.ones(3), "n": jnp.arange(3)}
    with pytest.raises(UsageError, match="could share the vector"):
        patches.init_ia3(base, targets={"wk|wv|bias": -1})
    with pytest.raises(UsageError, match="out of range"):
        patches.init_ia3(base, targets={"wk": 2})
    with pytest.raises(UsageError, match=r"near names.*wk"):
        patches.init_ia3(base, targets={"wq": 1})
    with pytest.raises(UsageError, match="inputs and outputs"):
        patches.init_lora(key, base, rank=1, targets="bias")
    with pytest.raises(StructureError, match="int32"):
        patches.init_dense(base, "^n$")
    with pytest.raises(UsageError, match="keeps no entry"):
        patches.init_sparse(base, jax.tree.map(lambda x: jnp.zeros(x.shape, bool), base))


@pytest.mark.soak
def test_a_leaf_of_more_than_2_to_the_31_entries_is_patched(x64):
    """11 GB of memory, for a minute."""
    weight = jnp.zeros((2**19 + 1, 4096), jnp.float8_e4m3fn)
    places = np.array([5, 2**31 - 1, 2**31 + 7])
    mask = np.zeros(weight.shape, bool)
    mask.reshape(-1)[places] = True
    start = patches.init_sparse({"w": weight}, {"w": mask})["w"]
    assert start.indices.dtype == jnp.int64
    patch = {"w": patches.Sparse(start.indices, jnp.array([1.0, 2.0, 3.0], jnp.float32))}
    for apply in (patches.apply, jax.jit(patches.apply)):
        flat = np.asarray(apply({"w": weight}, patch)["w"]).reshape(-1)
        np.testing.assert_array_equal(np.flatnonzero(flat.view(np.uint8)), places)
        assert flat[places].tolist() == [1, 2, 3]


def test_without_64_bits_a_leaf_of_that_size_is_refused_with_advice():
    patch = {"w": patches.Sparse(jnp.array([5]), jnp.array([1.0]))}
    with pytest.raises(StructureError, match=r"`w`.*2147487744 entries.*JAX_ENABLE_X64=1, or apply .* file"):
        patches.check({"w": jax.ShapeDtypeStruct((2**19 + 1, 4096), jnp.float32)}, patch)
