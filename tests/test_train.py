"""A step against hand-made gradient descent, and a training that is stopped against one that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import checkpoint, masks, patches, train
from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.train import _in_place


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes int32 counts and Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": jnp.zeros(3, dtype)}
    batches = [
        {"x": rng.normal(size=(8, 4)).astype(np.float32), "y": rng.normal(size=(8, 3)).astype(np.float32)}
        for _ in range(20)
    ]

    def loss(params, example):
        return (
            (example["x"].astype(dtype) @ params["w"] + params["b"] - example["y"].astype(dtype)) ** 2
        ).sum()

    return params, batches, loss


def mask_of(params):
    return masks.topk(jax.tree.map(jnp.abs, params), density=0.4)


def test_a_step_is_gradient_descent_on_the_mean_loss():
    params, batches, loss = problem()
    patch = patches.init_dense(params)
    step = train.make_step(loss, optax.sgd(0.1))
    state, value = step(train.init(patch, optax.sgd(0.1)), params, batches[0])
    mean = lambda p: np.mean([loss(p, {k: v[i] for k, v in batches[0].items()}) for i in range(8)])
    x, y = batches[0]["x"], batches[0]["y"]
    residual = x @ np.asarray(params["w"]) + np.asarray(params["b"]) - y
    expected = np.asarray(params["w"]) - 0.1 * 2 * x.T @ residual / 8
    np.testing.assert_allclose(value, mean(params), rtol=1e-5)
    np.testing.assert_allclose(patches.apply(params, train.patch_of(state))["w"], expected, rtol=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_sparse_patch_trains_as_gated_dense_parameters_do(optimizer):
    params, batches, loss = problem()
    mask = mask_of(params)
    sparse = patches.init_sparse(params, mask)
    state, _ = train.fit(
        train.init(sparse, optimizer), train.make_step(loss, optimizer), params, batches, steps=20
    )
    gated = optax.chain(optimizer, masks.gate(mask))
    whole = lambda base, patch: patch
    step = train.make_step(loss, gated, apply=whole)
    dense, _ = train.fit(train.init(params, gated), step, params, batches, steps=20)
    tuned = patches.apply(params, train.patch_of(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), tuned, dense.trainable)
    frozen = lambda new, old, m: np.testing.assert_array_equal(new[~m], old[~m])
    jax.tree.map(frozen, tuned, params, jax.tree.map(np.asarray, mask))


def test_optimiser_state_is_as_small_as_the_patch():
    params, _, _ = problem()
    sparse = patches.init_sparse(params, mask_of(params))
    state = train.init(sparse, optax.adam(1e-2))
    moments = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(moments) == 2 * patches.num_parameters(sparse) == 2 * 6


def test_values_are_trained_in_float32_under_bfloat16_weights():
    params, batches, loss = problem(jnp.bfloat16)
    patch = jax.tree.map(lambda x: x, patches.init_ia3(params, targets={"w": -1}))
    state, _ = train.fit(
        train.init(patch, optax.sgd(1e-4)), train.make_step(loss, optax.sgd(1e-4)), params, batches, steps=1
    )
    vector = train.patch_of(state)["w"].vector
    assert vector.dtype == jnp.float32 and ((vector != 1) & (abs(vector - 1) < 2**-8)).any()


@pytest.mark.parametrize("kind", ["sparse", "scale", "low_rank", "dense"])
def test_a_resumed_training_is_bit_identical(kind, tmp_path):
    params, batches, loss = problem()
    patch = {
        "sparse": lambda: patches.init_sparse(params, mask_of(params)),
        "scale": lambda: patches.init_ia3(params, targets={"w": -1}),
        "low_rank": lambda: patches.init_lora(jax.random.key(0), params, rank=2, targets="w"),
        "dense": lambda: patches.init_dense(params),
    }[kind]()
    optimizer = optax.adam(1e-2)
    step = train.make_step(loss, optimizer)
    start = lambda: train.init(patch, optimizer)
    straight, losses = train.fit(start(), step, params, batches, steps=20)
    folder = tmp_path / "state"
    train.fit(start(), step, params, batches, steps=7, folder=folder, every=3)
    resumed, rest = train.fit(start(), step, params, batches, steps=20, folder=folder, every=3)
    assert len(rest) == 13
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    np.testing.assert_array_equal(losses[7:], rest)


def test_donating_the_state_leaves_the_base_alone():
    params, batches, loss = problem()
    step = train.make_step(loss, optax.sgd(0.1))
    train.fit(train.init(patches.init_dense(params), optax.sgd(0.1)), step, params, batches, steps=2)
    assert np.isfinite(params["w"]).all()  # raises if it was deleted


def test_bad_states_are_refused(tmp_path):
    params, batches, loss = problem()
    optimizer = optax.adam(1e-2)
    state = train.init(patches.init_dense(params), optimizer)
    with pytest.raises(UsageError, match="not a folder"):
        train.restore_state(tmp_path / "none", state)
    train.save_state(tmp_path / "state", state)
    other = train.init(patches.init_ia3(params, targets={"w": -1}), optimizer)
    with pytest.raises(StructureError):
        train.restore_state(tmp_path / "state", other)
    (tmp_path / "broken").mkdir()
    with pytest.raises(FileFormatError, match="no readable training state"):
        train.restore_state(tmp_path / "broken", state)
    with pytest.raises(UsageError, match="ended after 20 of 21"):
        train.fit(state, train.make_step(loss, optimizer), params, batches, steps=21)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.02, momentum=0.9, nesterov=True)),
    "adafactor": optax.adafactor(1e-2, weight_decay_rate=1e-3),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_entries_are_bit_identical_after_thousands_of_steps_and_refreshes(name, dtype):
    params, batches, loss = problem(dtype)
    params["w"] = params["w"].at[0, 0].set(-0.0)
    optimizer, batch = OPTIMIZERS[name], batches[0]
    step = train.make_step(loss, optimizer)
    run = jax.jit(lambda s, p: jax.lax.scan(lambda s, _: step(s, p, batch), s, length=1000)[0])
    first, second = ({"w": jnp.arange(12).reshape(4, 3) % 4 == i, "b": jnp.arange(3) == i} for i in (1, 2))
    state, base = run(train.init(patches.init_sparse(params, first), optimizer), params), params
    for mask in (first, second):
        before = patches.apply(base, train.patch_of(state))
        state, base = train.refresh(state, base, mask, optimizer)
        jax.tree.map(same_bits, base, before)
        state = run(state, base)
        after = patches.apply(base, train.patch_of(state))
        changed = jax.tree.map(lambda a, b: bits(a) != bits(b), before, after)
        assert not any((c & ~m).any() for c, m in zip(*map(jax.tree.leaves, (changed, mask))))
    assert all(c[m].any() for c, m in zip(*map(jax.tree.leaves, (changed, second))))
    same = patches.apply(params, patches.diff(params, after))
    jax.tree.map(same_bits, same, after)


def bits(x):
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


def same_bits(a, b):
    np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("keep", [True, False])
def test_a_refresh_carries_what_stays_and_starts_the_rest_clean(keep):
    params, batches, loss = problem()
    optimizer = optax.adam(1e-2)
    step = jax.jit(train.make_step(loss, optimizer))
    at = lambda *where: {
        "w": jnp.isin(jnp.arange(12), jnp.array(where)).reshape(4, 3),
        "b": jnp.zeros(3, bool),
    }
    state = train.init(patches.init_sparse(params, at(1, 5, 7)), optimizer)
    for batch in batches[:5]:
        state, _ = step(state, params, batch)
    new, base = train.refresh(state, params, at(2, 5, 11), optimizer, keep=keep)
    (mu, nu), (old_mu, old_nu) = (
        (s.opt_state[0].mu["w"].values, s.opt_state[0].nu["w"].values) for s in (new, state)
    )
    np.testing.assert_array_equal(mu, [0, old_mu[1], 0])
    np.testing.assert_array_equal(nu, [0, old_nu[1], 0])
    assert int(new.opt_state[0].count) == int(new.step) == 5
    learnt, flat = train.patch_of(state)["w"].values, params["w"].reshape(-1)
    np.testing.assert_array_equal(train.patch_of(new)["w"].values, [flat[2], learnt[1], flat[11]])
    want = flat.at[jnp.array([1, 5, 7])].set(learnt) if keep else flat
    np.testing.assert_array_equal(base["w"].reshape(-1), want)
    # The same mask again changes nothing at all, and a whole leaf may come and go.
    again, _ = train.refresh(new, base, at(2, 5, 11), optimizer, keep=keep)
    jax.tree.map(np.testing.assert_array_equal, again, new)
    only_b = {"w": jnp.zeros((4, 3), bool), "b": jnp.ones(3, bool)}
    moved, base = train.refresh(new, base, only_b, optimizer, keep=keep)
    assert set(train.patch_of(moved)) == {"b"} and not moved.opt_state[0].mu["b"].values.any()
    moved, _ = step(moved, base, batches[0])
    with pytest.raises(StructureError):
        train.refresh(moved, base, {"w": only_b["w"]}, optimizer)
    with pytest.raises(UsageError, match="no sparse entries"):
        train.refresh(train.init(patches.init_dense(params), optimizer), params, only_b, optimizer)


def test_small_steps_add_up_under_bfloat16():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    optimizer = optax.sgd(1.0)
    step = jax.jit(train.make_step(lambda p, e: (p["w"] * e["g"]).sum(), optimizer))
    state = train.init(patches.init_sparse(params, {"w": jnp.array([True, False, False, True])}), optimizer)
    batch = {"g": jnp.full((1, 4), 2.0**-10, jnp.bfloat16)}
    for _ in range(16):
        state, _ = step(state, params, batch)
    assert train.patch_of(state)["w"].values.dtype == jnp.float32
    np.testing.assert_array_equal(train.patch_of(state)["w"].values, np.float32(1 - 2.0**-6))
    np.testing.assert_array_equal(patches.apply(params, train.patch_of(state))["w"][1:3], 1)


@pytest.mark.parametrize("spec", [("x", None), (None, "y"), (("x", "y"), None)])
def test_sharded_parameters_train_alike_and_stay_sharded(spec):
    params, batches, loss = problem()
    params["w"] = jnp.tile(params["w"], (2, 2))[:, :4]
    wide = lambda b: {"x": jnp.tile(b["x"], (1, 2)), "y": jnp.tile(b["y"], (1, 2))[:, :4]}
    params["b"] = jnp.zeros(4)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    placed = {"w": jax.device_put(params["w"], sharding), "b": params["b"]}
    optimizer = optax.adam(1e-2)
    step = jax.jit(train.make_step(loss, optimizer))
    results = []
    for p in (params, placed):
        state = train.init(
            patches.init_sparse(p, masks.topk(jax.tree.map(jnp.abs, p), density=0.3)), optimizer
        )
        for batch in batches[:4]:
            state, _ = step(state, p, wide(batch))
        results.append(patches.apply(p, train.patch_of(state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert results[1]["w"].sharding.is_equivalent_to(sharding, 2)
    changed = bits(results[1]["w"]) != bits(params["w"])
    assert 0 < changed.sum() <= 11


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_in_place_is_the_step(dtype):
    params, batches, loss = problem(dtype)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    patch = patches.init_sparse(params, mask_of(params))
    plain, state = train.init(patch, optimizer), train.init(patch, optimizer)
    step = jax.jit(train.make_step(loss, optimizer))
    in_place = jax.jit(train.make_in_place_step(loss, optimizer), donate_argnums=(0, 1))
    tuned = jax.tree.map(jnp.copy, params)
    for batch in batches:
        plain, want = step(plain, params, batch)
        state, tuned, got = in_place(state, tuned, batch)
        np.testing.assert_allclose(got, want, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state, plain)
    jax.tree.map(same_bits, tuned, patches.apply(params, train.patch_of(state)))
    with pytest.raises(UsageError, match="not patched sparsely"):
        in_place(train.init(patches.init_dense(params, "b"), optimizer), params, batches[0])


def test_a_step_in_place_copies_no_weight(monkeypatch):
    size, optimizer = 512, optax.adam(1e-2)
    shapes = {n: jax.ShapeDtypeStruct((size, size), jnp.float32) for n in "abcd"}
    some = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.float32)
    state = jax.eval_shape(lambda p: train.init(p, optimizer), {n: patches.Sparse(*some) for n in shapes})
    batch = {"x": jax.ShapeDtypeStruct((2, size), jnp.float32)}

    def loss(params, example):
        x = example["x"]
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        return x.sum()

    def temporaries(step, donated):
        compiled = jax.jit(step, donate_argnums=donated).lower(state, shapes, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * size * size)

    step = train.make_in_place_step(loss, optimizer)
    alone = temporaries(step, (0, 1))
    monkeypatch.setattr(_in_place, "_after", lambda grads: jnp.int32(0))
    unordered = temporaries(train.make_in_place_step(loss, optimizer), (0, 1))
    print(f"in weights: {alone:.2f}, {unordered:.2f} if writes are not ordered after reads")
    assert alone < 4.5 and unordered > alone + 1.5  # the gradients of four; and copies


def test_a_training_in_stages_goes_on_after_a_stop_to_the_same_bits(tmp_path, monkeypatch):
    params, batches, loss = problem(jnp.bfloat16)
    optimizer = optax.adam(1e-2)
    step = train.make_step(loss, optimizer)
    count = lambda p: int(jnp.abs(p["w"].astype(jnp.float32)).sum() * 1e4) % 4  # another mask each time
    choose = lambda p: {
        "w": (jnp.arange(12) % 4 == count(p)).reshape(4, 3),
        "b": jnp.array([True, False, False]),
    }
    start = lambda: train.init(patches.init_sparse(params, choose(params)), optimizer)

    def fit(folder, steps=20):
        return train.fit_refreshed(
            start(), step, params, lambda: iter(batches), choose, optimizer,
            steps=steps, refresh_every=6, folder=folder, every=4,
        )  # fmt: skip

    state, base, losses = fit(None)
    assert len(losses) == 20
    fit(tmp_path / "a", steps=14)  # stops two steps after a refresh
    with monkeypatch.context() as stop:  # and between the two files that a refresh writes
        stop.setattr(checkpoint, "save_mask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "a")
    again, new_base, _ = fit(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, (again, new_base), (state, base))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["stage-3"]
    whole = patches.apply(base, train.patch_of(state))
    jax.tree.map(same_bits, patches.apply(params, patches.diff(params, whole)), whole)
    with pytest.raises(UsageError, match="`refresh_every` must be at least 1"):
        train.fit_refreshed(start(), step, params, list, choose, optimizer, steps=1, refresh_every=0)
