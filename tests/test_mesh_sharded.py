"""What runs on eight devices gives what one device gives: a step, Fishers, merging, generation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import checkpoint, contribute, fisher, masks, merge, mesh, models, patches, train, tree
from tests.test_train_sync import collectives

T5 = {
    "model_type": "t5",
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
AXES = {"data": 2, "fsdp": 2, "tensor": 2}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax and Flax mix dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def drawn(model, seed, dtype="float32"):
    """Parameters from numpy, which compiles nothing: scales about 1, all else about 0."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(((x.ndim == 1) + 0.2 * rng.normal(size=x.shape)).astype(dtype))
    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def problem(config, dtype):
    """A model, parameters, a patch that trains and a batch of 8."""
    model = models.build(config)
    params = drawn(model, 0, dtype)
    ids = np.random.default_rng(0).integers(2, 32, (3, 8, 6)).astype(np.int32)
    batch = {"input_ids": ids[0], "attention_mask": (np.arange(6) < 3 + ids[1] % 4).astype(np.int32)}
    if config is T5:
        batch["labels"] = ids[2, :, :4]
        patch = patches.init_ia3(params, targets="paper")
    else:
        patch = patches.init_lora(jax.random.key(1), params, rank=2, targets="paper")
        flat = jax.tree.map(
            lambda x: x.reshape(-1)[::5],
            {"model.embed_tokens.weight": params["model"]["embed_tokens"]["weight"]},
        )
        patch |= {n: patches.Sparse(5 * jnp.arange(x.size, dtype=jnp.int32), x) for n, x in flat.items()}
    return model, params, patch, batch


def apart(a, b):
    """The norm of the difference over the norm, both of all leaves."""
    total = lambda t: (
        float(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(t))) ** 0.5
    )
    return total(
        jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)
    ) / total(b)


@pytest.mark.usefixtures("quick_here")
@pytest.mark.parametrize(("config", "dtype"), [(T5, "float32"), (LLAMA, "float64")], ids=["t5", "llama"])
def test_steps_fishers_logits_and_generation_are_those_of_one_device(config, dtype):
    with jax.enable_x64(dtype == "float64"):
        model, params, patch, batch = problem(config, dtype)
        on = mesh.make(AXES)
        placed = mesh.shard(params, mesh.rules(model, on), on)
        spread = mesh.shard_batch(batch, on)
        loss, optimizer = models.example_loss(model), optax.sgd(0.1, momentum=0.9)

        def all_of_it(held, sharding=None):
            step = contribute.make_step(model, optimizer, held, remat=held is not None)
            estimators = [fisher.empirical(loss, method=m) for m in ("reference", "one_pass")]

            update = lambda e, params, batch: e.update(e.init(params), params, batch, sharding=sharding)

            def run(state, params, batch):
                squares = [update(e, params, batch).total for e in estimators]
                ids = {n: batch[n] for n in ("input_ids", "attention_mask")}
                new = model.generate(params, ids, max_new_tokens=2)
                trained = jax.lax.scan(lambda s, _: step(s, params, batch), state, length=3)
                return trained, squares, new, model.apply(params, batch)

            return jax.jit(run)

        state = train.init(patch, optimizer)
        (one, values), squares, ids, logits = all_of_it(None)(state, params, batch)
        (eight, sharded_values), sharded_squares, sharded_ids, sharded_logits = all_of_it(
            on, spread["input_ids"].sharding
        )(mesh.follow(state, placed), placed, spread)
        most = TOLERANCE[dtype]
        moved = jax.tree.map(lambda x, y: x - y, one.trainable, state.trainable)
        sharded_moved = jax.tree.map(lambda x, y: x - y, eight.trainable, state.trainable)
        assert apart(eight.opt_state[0].trace, one.opt_state[0].trace) < most
        assert apart(sharded_moved, moved) < most and apart(sharded_values, values) < most
        assert apart(sharded_logits, logits) < most
        for a, b in zip(sharded_squares, squares, strict=True):
            assert apart(a, b) < most
        assert apart(squares[1], squares[0]) < most
        jax.tree.map(np.testing.assert_array_equal, sharded_ids, ids)
        assert len(jax.tree.leaves(eight.opt_state[0].trace)[0].sharding.device_set) == 8


def test_patches_side_by_side_train_and_generate_as_on_one_device():
    model, params, _, batch = problem(LLAMA, "float32")
    ids = {n: batch[n] for n in ("input_ids", "attention_mask")}
    lora = lambda i: patches.init_lora(jax.random.key(i), params, rank=2, targets="paper")
    start = patches.stack([patches.init_ia3(params, targets="paper"), lora(0), lora(1)])
    tasks, rule = jnp.array([0, 1, 2, -1, 2, 1, 0, 0]), optax.sgd(0.1, momentum=0.9)
    step = jax.jit(train.make_mixed_step(models.example_loss(model), rule))

    def all_of_it(params, batch, place):
        state = place(train.init(start, rule))
        for _ in range(2):
            state, loss = step(state, params, {**batch, "task_ids": tasks})
        told = {n: batch[n] for n in ids}
        chosen = patches.select(train.patch_of(state), np.asarray(tasks))
        return state, loss, model.generate(params, told, max_new_tokens=3, patch=chosen)

    one, loss, new = all_of_it(params, ids, lambda state: state)
    on = mesh.make(AXES)
    placed = mesh.shard(params, mesh.rules(model, on), on)
    eight, same, sharded_new = all_of_it(
        placed, mesh.shard_batch(ids, on), lambda state: mesh.follow(state, placed)
    )
    assert apart(eight.opt_state[0].trace, one.opt_state[0].trace) < TOLERANCE["float32"]
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, sharded_new, new)


@pytest.mark.slow
def test_a_contributors_run_on_a_mesh_makes_the_patch_of_one_device(tmp_path):
    model = models.build({**T5, "num_layers": 2})
    models.save(tmp_path / "model", model, drawn(model, 0))
    rng = np.random.default_rng(0)
    rows = [{n: rng.integers(2, 32, 5).tolist() for n in ("input_ids", "labels")} for _ in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = lambda out, **options: contribute.run(
        model=str(tmp_path / "model"),
        data_from=str(tmp_path / "rows.jsonl"),
        out=str(tmp_path / out),
        make=contribute.ia3,
        steps=3,
        learning_rate=1e-2,
        batch_size=8,
        **options,
    )
    run("one")
    digest = run("eight", on=mesh.make(AXES), remat=True, scan=True)
    one, eight = (checkpoint.load_patch(tmp_path / n)[0] for n in ("one", "eight"))
    assert one.keys() == eight.keys() and checkpoint.read_patch(tmp_path / "eight").digest == digest
    apart_from_1 = lambda patch: {n: kind.vector - 1 for n, kind in patch.items()}
    assert apart(apart_from_1(eight), apart_from_1(one)) < 1e-3  # Adam divides small gradients by themselves
    ids = [checkpoint.read_patch(tmp_path / n).base_id for n in ("one", "eight")]
    assert ids[0] == ids[1] and not (tmp_path / "eight.partial").exists()


@pytest.mark.slow
def test_a_mask_is_refreshed_on_a_mesh_as_on_one_device():
    config = {
        "model_type": "fishjax_digits",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 16,
    }
    model = models.build(config)
    base, rng = drawn(model, 0), np.random.default_rng(1)
    rows = {"image": rng.random((16, 8, 8), np.float32), "label": rng.integers(0, 10, 16).astype(np.int32)}
    choose = lambda params: masks.magnitude(params, density=0.1)

    def fit(params):
        start = patches.init_sparse(*mesh.gather((params, choose(params))))
        options = {"steps": 6, "learning_rate": 0.3, "batch_size": 8}
        return contribute.fit(start, params, model, rows, refresh=(choose, 3), **options)

    on = mesh.make({"data": 2, "fsdp": 4})
    alone, spread = fit(base), fit(mesh.shard(base, mesh.rules(model, on), on))
    moved = lambda patch: tree.flatten(patches.apply(base, mesh.gather(patch)))
    numbers = sum(int((x != y).sum()) for x, y in zip(moved(alone).values(), tree.flatten(base).values()))
    assert numbers > sum(
        int(x.sum()) for x in jax.tree.leaves(choose(base))
    )  # the second mask is another one
    for name, x in moved(alone).items():
        np.testing.assert_allclose(moved(spread)[name], x, rtol=1e-5, atol=1e-6)


# What all of a rule's arguments give, and whether it measures whole leaves: then one number a leaf is summed.
MERGES = {
    "average": (lambda a, b, base, f: merge.average([a, b], weights=[1, 2]), None),
    "fisher": (lambda a, b, base, f: merge.fisher([a, b], fishers=[f, f]), None),
    "task_arithmetic": (
        lambda a, b, base, f: merge.task_arithmetic([a, b], base=base, weights=[0.5, 0.2]),
        None,
    ),
    "gradient_matching": (
        lambda a, b, base, f: merge.gradient_matching([a, b], base=base, fishers=[f, f], base_fisher=f),
        None,
    ),
    "dare": (lambda a, b, base, f: merge.dare([a, b], base=base, density=0.5), None),
    "ties": (lambda a, b, base, f: merge.ties([a, b], base=base, density=0.3, scope="global"), "u32"),
    "breadcrumbs": (
        lambda a, b, base, f: merge.breadcrumbs([a, b], base=base, density=0.5, gamma=0.1),
        "u32",
    ),
    "slerp": (lambda a, b, base, f: merge.slerp([a, b], t=0.3), "f32"),
    "model_stock": (lambda a, b, base, f: merge.model_stock([a, b], base=base), "f32"),
}


@pytest.fixture(scope="module")
def divided():
    """Two models, their base and a Fisher on eight devices, and the same on one."""
    on, model = mesh.make(AXES), models.build(LLAMA)
    a, b, base = (drawn(model, seed) for seed in range(3))
    alone = (a, b, base, jax.tree.map(lambda x: x * x, base))
    return [mesh.shard(x, mesh.rules(model, on), on) for x in alone], alone


@pytest.mark.parametrize("rule", MERGES)
def test_elementwise_merging_of_sharded_models_gathers_nothing(rule, divided):
    merged, summed = MERGES[rule]
    sharded, alone = divided
    program = jax.jit(merged).lower(*sharded).compile()
    sent = collectives(program)
    assert set(sent) == ({("all-reduce", summed, 1)} if summed else set())
    found, want = program(*sharded), jax.jit(merged)(*alone)
    for x, y, like in zip(*map(jax.tree.leaves, (found, want, sharded[0])), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        # Within one rounding: here, bit for bit, but for sums of floats, whose order differs.
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 if summed == "f32" else 0)
