"""A step against hand-made gradient descent, and a training that is stopped against one that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import masks, patches, train
from fishjax.errors import FileFormatError, StructureError, UsageError


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
