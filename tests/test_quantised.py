"""Weights in eight and four bits: the codec against qwix, every use of a leaf, patches, folders, meshes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from fishjax import checkpoint, data, leaves, mesh, models, patches, train, tree
from fishjax.cli import main
from fishjax.errors import UsageError
from fishjax.leaves import Quantised, quantise, quantised
from tests.test_leaves import USES, X, close, patch_of

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "quantised" / "qwix.npz")
FORMATS = ("int8", "int4", "nf4")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16}
BATCH = {"input_ids": np.array([[3, 1, 4, 1], [5, 9, 2, 6]])}


@jax.jit
def dense(params):
    return tree.nest({n: leaves.array(x) for n, x in tree.flatten(params).items()})


def built(config):
    model = models.build(config)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def llama():
    return built(LLAMA)


def unpacked(leaf):
    """The codes one by one, signed for int4."""
    codes = np.asarray(leaf.codes)
    if leaf.format != "int8":
        codes = np.concatenate([codes & 15, codes >> 4], -1)[..., : leaf.group].astype(np.int8)
    codes = codes - np.int8(8) if leaf.format == "int4" else codes
    return codes.reshape(*codes.shape[:-2], -1)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_scales_and_values_are_those_of_qwix(format):
    leaf = quantised(jnp.asarray(FIXTURE["weight"]), format, group=32)
    np.testing.assert_array_equal(unpacked(leaf), FIXTURE[f"{format}.codes"])
    np.testing.assert_array_equal(leaf.scales, FIXTURE[f"{format}.scales"])
    np.testing.assert_array_equal(leaf.materialise(), FIXTURE[f"{format}.values"])


@pytest.mark.parametrize("format, axis", [("int8", 0), ("int4", -1), ("nf4", 1)])
def test_an_entry_is_wrong_by_half_a_step_at_most(format, axis, x64):
    w = np.random.default_rng(0).normal(size=(6, 10, 15))  # an odd axis packs too
    leaf = quantised(jnp.asarray(w), format, axis=axis, group=5)
    assert leaf.shape == w.shape and leaf.dtype == w.dtype and leaf.group in (3, 5, 6)
    moved = np.moveaxis(w, axis, -1)
    largest = np.abs(moved.reshape(*moved.shape[:-1], -1, leaf.group)).max(-1, keepdims=True)
    # The widest gap of nf4 is that between its first two values.
    step = {"int8": 1 / 127.5, "int4": 1 / 7.5, "nf4": 1 - 0.6961928009986877}[format] / 2
    wrong = np.moveaxis(np.asarray(leaf.materialise()) - w, axis, -1).reshape(*largest.shape[:-1], leaf.group)
    assert (np.abs(wrong) <= step * largest * (1 + 1e-6)).all()


PATCHED = [(use, k) for use in ("heads", "embedding", "scanned") for k in ("outputs", "inputs", "low_rank")]
FORMED = {"strided": ["w: slice"]}  # across groups


def test_every_use_is_that_of_the_dense_weight(x64, monkeypatch):
    """Outputs, gradients of the input and of a patch on top; one program, for it is compiled once."""
    monkeypatch.setattr("fishjax.leaves._quantised.SMALL", 0)
    cases = {}
    for use, kind in [(use, None) for use in USES] + PATCHED:
        fn, shape, inputs = USES[use]
        call = lambda params, x, fn=fn: fn(params["w"], x)
        axis = -1 if use == "embedding" else inputs[-1]
        w = quantised(
            jnp.array(np.random.default_rng(3).normal(size=shape)), "int8", axis=axis, group=2, name="w"
        )
        patch = {} if kind is None else patch_of(kind, shape, inputs)
        assert patches.unfolded_report(call)({"w": w}, patch, X) == FORMED.get(use, []), use
        cases[f"{use} {kind}"] = call, w, patch

    def answers(apply, formed):
        def loss(patch, x, use, params):
            x = lax.stop_gradient(x) if "while" in use else x  # a loop without end in sight has no gradient
            out = apply(cases[use][0])(params, patch, x)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out)), out

        both = jax.grad(loss, argnums=(0, 1), has_aux=True)
        of = lambda use, w, patch: both(patch, jnp.asarray(X), use, {"w": formed(w)})
        return jax.jit(lambda: {use: of(use, w, patch) for use, (_, w, patch) in cases.items()})()

    got = answers(patches.unfolded, lambda w: w)
    folded = lambda call: lambda params, patch, x: call(patches.apply(params, patch), x)
    want = answers(folded, leaves.array)
    for case in got:
        close(got[case], want[case], 1e-5 if "cast" in case else 1e-11)


def test_forward_mode_and_more_rows_in_bfloat16():
    w = jnp.array(np.random.default_rng(0).normal(size=(256, 128)), jnp.bfloat16)
    x = jnp.array(np.random.default_rng(1).normal(size=(3, 5, 128)), jnp.bfloat16)
    leaf = quantised(w, "nf4")
    f = lambda w, x: jnp.einsum("bti,oi->bto", x, w)
    got, tangent = jax.jvp(lambda x: leaves.interpret(f)(leaf, x), (x,), (x,))
    assert got.dtype == jnp.bfloat16
    want = np.asarray(f(leaf.materialise(), x), np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2**-7 * np.abs(want).max())
    np.testing.assert_array_equal(got, tangent)


def test_a_row_that_is_not_there_is_nan_as_in_the_dense_table():
    leaf = quantised(jnp.ones((5, 8)))
    rows = leaves.interpret(lambda w: jnp.take(w, jnp.array([4, 5]), axis=0))(leaf)
    assert jnp.isfinite(rows[0]).all() and jnp.isnan(rows[1]).all()


@pytest.mark.usefixtures("quick_here")
@pytest.mark.parametrize("config, to", [(LLAMA, "nf4"), (GPT2, "int8")], ids=["llama", "gpt2"])
def test_apply_and_generate_take_quantised_parameters(config, to):
    model, params = built(config)
    params = quantise(params, to)
    assert leaves.materialised(model.apply)(params, BATCH) == []
    generate = lambda params, batch: model.generate(params, batch, max_new_tokens=4)
    assert leaves.materialised(generate)(params, BATCH) == []
    close(model.apply(params, BATCH), jax.jit(model.apply)(dense(params), BATCH), 2e-6)
    np.testing.assert_array_equal(generate(params, BATCH), generate(dense(params), BATCH))


def test_no_more_than_a_piece_is_held_in_floats(key):
    # Sizes as in a model of some size: at these the norms and positions do not count.
    model = models.build({**LLAMA, "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1024})
    params = jax.eval_shape(model.init, key)
    full = sum(x.size * 4 for x in jax.tree.leaves(params))
    batch = {"input_ids": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    held, stored = {}, {}
    for to in FORMATS:
        small = jax.eval_shape(lambda p, to=to: quantise_traced(p, to), params)
        stored[to] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(small)) / full
        memory = jax.jit(model.apply).lower(small, batch).compile().memory_analysis()
        held[to] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / full
    assert stored["int8"] <= 0.27 and stored["int4"] <= 0.15 and stored["nf4"] <= 0.15, stored
    assert held["int8"] <= 0.32, held


def quantise_traced(params, to):
    """`quantise` without the check of its values, which needs them."""
    flat = tree.flatten(params)
    axes = {n: x.ndim >= 2 for n, x in flat.items()}
    return tree.rebuild(params, {n: quantised(x, to, name=n) if axes[n] else x for n, x in flat.items()})


def test_a_backward_pass_keeps_no_floats_of_a_weight_either(key):
    model = models.build({**LLAMA, "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024})
    params = jax.eval_shape(model.init, key)
    full = sum(x.size * 4 for x in jax.tree.leaves(params))
    small = jax.eval_shape(lambda p: quantise_traced(p, "int8"), params)
    patch = jax.eval_shape(lambda p: patches.init_ia3(p, targets="paper"), params)
    loss = lambda patch, params: jnp.sum(patches.unfolded(model.apply)(params, patch, BATCH))
    memory = jax.jit(jax.grad(loss)).lower(patch, small).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * full


@pytest.mark.usefixtures("quick_here")
def test_patches_train_on_frozen_quantised_weights(llama, key, x64):
    """LoRA and (IA)^3, and a kind that is folded, which forms its weight; all at once."""
    model, params = llama
    params = quantise(jax.tree.map(lambda x: x.astype(jnp.float64), params), "nf4")
    patch = patches.init_ia3(params, targets="paper")
    lora = patches.init_lora(key, params, rank=2, targets=[r"q_proj\.weight", r"embed_tokens\.weight"])
    patch |= jax.tree.map(lambda x: x + 0.1, lora)
    patch["lm_head.weight"] = patches.Sparse(jnp.array([1, 7]), jnp.array([0.5, -0.5]))
    trainable, fixed = patches.partition(patch)

    def loss(trainable, params):
        logits = patches.unfolded(model.apply)(params, patches.combine(trainable, fixed), BATCH)
        return jnp.mean(jnp.square(jnp.sin(logits)))

    got = jax.jit(jax.value_and_grad(loss))(trainable, params)
    want = jax.jit(jax.value_and_grad(loss))(trainable, dense(params))
    close(got, want, 1e-12)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(got[1]))


@pytest.mark.usefixtures("quick_here")
def test_a_trained_model_answers_as_before():
    """The digits transformer, trained briefly: its likeliest class stays in 99 % of the test set."""
    images, labels = load_digits(return_X_y=True)
    found = {"image": (images.reshape(-1, 8, 8) / 16).astype(np.float32), "label": labels.astype(np.int32)}
    rows = lambda start, stop: {n: x[start:stop] for n, x in found.items()}
    model = models.build({"model_type": "fishjax_digits", "hidden_size": 64, "intermediate_size": 128})
    loss, optimizer = models.example_loss(model), optax.adam(3e-3)
    params = model.init(jax.random.key(0))
    patch = patches.init_dense(params)
    state = train.init(patch, optimizer)
    batches = data.batches(rows(0, 1297), 64, seed=0, epochs=None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax wants it
        state, _ = train.fit(state, train.make_step(loss, optimizer), params, batches, steps=150)
    params = patches.apply(params, train.patch_of(state))
    test = rows(1297, None)
    classes = lambda params: np.asarray(model.apply(params, test)).argmax(-1)
    before = classes(params)
    assert (before == test["label"]).mean() > 0.9
    assert (classes(quantise(params, "int8")) == before).mean() >= 0.99
    assert (classes(quantise(params, "nf4")) == before).mean() >= 0.95


@pytest.fixture
def folder(tmp_path, llama):
    models.save(tmp_path / "model", *llama)
    return tmp_path / "model"


def test_a_folder_loads_quantised_one_tensor_at_a_time(folder, monkeypatch):
    """What lies on the device in floats, when a tensor has been placed, are the leaves that stay floats."""
    _, params = models.load(folder)
    want = quantise(params, "nf4")
    del params
    largest, most = 320 * 64 * 4, 0
    before = sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.float32)
    block = jax.block_until_ready

    def watched(x):
        nonlocal most
        x = block(x)
        most = max(most, sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.float32) - before)
        return x

    monkeypatch.setattr(jax, "block_until_ready", watched)
    _, got = models.load(folder, quantise="nf4")
    scales_and_norms = sum(x.nbytes for x in jax.tree.leaves(want) if x.dtype == jnp.float32)
    assert most <= largest + scales_and_norms
    close(got, want, 0)


def test_rules_say_what_is_quantised_and_how(folder):
    rules = [("norm", None), ("lm_head|embed", "int8"), ("proj", {"format": "nf4", "group": 32})]
    _, params = models.load(folder, quantise=rules)
    kinds = {n: (x.format, x.group) for n, x in tree.flatten(params).items() if isinstance(x, Quantised)}
    assert kinds["lm_head.weight"] == ("int8", 64)
    assert kinds["model.layers.0.mlp.up_proj.weight"] == ("nf4", 32)
    assert not any("norm" in n for n in kinds)


def test_wrong_arguments_are_named(folder):
    w = jnp.ones((4, 4))
    for call, text in (
        (lambda: quantised(w, "int3"), "`int3`"),
        (lambda: quantised(w, group=0), "`group`"),
        (lambda: quantised(jnp.ones((4, 4), jnp.int32)), "int32"),
        (lambda: quantise({"weight": w}, "int9"), "`int9`"),
        (lambda: quantise({"v": w}, "int8"), "nothing"),
        (lambda: quantise({"v": w}, [("u", "int8")]), "matches no leaf"),
        (lambda: quantise({"weight": w.at[0, 0].set(jnp.nan)}, "int8"), "`weight`.*not finite"),
        (lambda: models.load(folder, quantise="int9"), "`int9`"),
    ):
        with pytest.raises(UsageError, match=text):
            call()


@pytest.mark.usefixtures("quick_here")
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_codes_are_sharded_like_the_weight_and_never_gathered(config):
    wide = {"hidden_size": 128, "n_embd": 128}
    model, params = built({**config, **{n: size for n, size in wide.items() if n in config}})
    grid = mesh.make({"tensor": 2})
    rules = mesh.rules(model, grid)
    whole = quantise(params, [("norm|ln_|bias|wpe", None), ("", {"format": "int8", "group": 16})])
    params = mesh.shard(whole, rules, grid)
    held = dict.fromkeys(grid.devices.flat, 0)
    for leaf in (x for x in jax.tree.leaves(params) if x.dtype == jnp.int8):
        for piece in leaf.addressable_shards:
            held[piece.device] += piece.data.nbytes
    codes = sum(x.nbytes for x in jax.tree.leaves(whole) if x.dtype == jnp.int8)
    assert max(held.values()) == codes / 2
    program = jax.jit(model.apply).lower(params, BATCH).compile()
    text = program.as_text()
    assert not [line for line in text.splitlines() if "all-gather" in line and "s8[" in line]
    close(program(params, BATCH), model.apply(whole, BATCH), 1e-5)


def test_a_folder_lands_quantised_on_a_mesh(folder):
    model, whole = models.load(folder, quantise="int8")
    grid = mesh.make({"tensor": 4})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = mesh.shardings(shapes, mesh.rules(model, grid), grid)
    _, params = models.load(folder, quantise="int8", shardings=where)
    down = params["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]  # [out, in]
    assert down.codes.sharding.spec == PartitionSpec(None, None, None)  # one group: 4 does not divide it
    up = params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    assert isinstance(up.sharding, NamedSharding) and up.sharding.spec[0] == "tensor"
    close(jax.device_get(params), jax.device_get(whole), 0)


@pytest.mark.usefixtures("quick_here")
def test_the_command_line_quantises_what_is_loaded_and_patched(folder, llama, tmp_path, capsys):
    model, params = llama
    args = ["generate", "--model", str(folder), "--ids", "--json", "--max-new-tokens", "4", "3 1 4"]
    answer = lambda params: model.generate(params, {"input_ids": [[3, 1, 4]]}, max_new_tokens=4)[0].tolist()
    assert main([*args, "--quantise", "nf4"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == answer(quantise(params, "nf4"))
    patch = {n: patches.Scale(3 * p.vector) for n, p in patches.init_ia3(params, targets="paper").items()}
    checkpoint.save_patch(tmp_path / "p.safetensors", patch, base=params)
    assert main([*args, "--quantise", "nf4", "--patch", str(tmp_path / "p.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == answer(quantise(patches.apply(params, patch), "nf4"))
    assert main([*args, "--quantise", "int9"]) == 2
