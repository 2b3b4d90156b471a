"""Models that fishjax knows nothing of: a FISH patch on an nnx model, a Linen model and a plain function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fishjax import checkpoint, fisher, masks, patches, train, tree

pytestmark = pytest.mark.usefixtures("quick")

CLASSES = 3


def linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES, name="out")(nn.tanh(nn.Dense(8, name="inner")(x)))

    net = Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    return params, lambda params, x: net.apply({"params": params}, x)


def nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(5, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)  # state beside parameters
            self.out = nnx.Linear(8, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.inner(x))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)


def plain_model():
    a, b = jax.random.split(jax.random.key(0))
    params = [
        {"w": jax.random.normal(a, (5, 8))},
        {"w": jax.random.normal(b, (8, CLASSES)), "b": jnp.zeros(CLASSES)},
    ]
    return params, lambda params, x: jnp.tanh(x @ params[0]["w"]) @ params[1]["w"] + params[1]["b"][None]


MODELS = {"linen": linen_model, "nnx": nnx_model, "plain": plain_model}


@pytest.mark.parametrize("kind", MODELS)
def test_a_fish_patch_trains_on_any_model(kind, tmp_path):
    params, apply = MODELS[kind]()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    data = {"x": x, "y": jnp.argmax(x[:, :CLASSES], axis=1)}

    def loss(params, example):
        logits = apply(params, example["x"][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    scores = fisher.estimate(fisher.empirical(loss), params, [data])
    mask = masks.topk(scores, density=0.2)
    patch = patches.init_sparse(params, mask)
    optimizer = optax.sgd(0.3, momentum=0.9)  # optax.adam does not run under strict promotion
    mean = lambda p: float(jax.vmap(loss, (None, 0))(p, data).mean())
    state, losses = train.fit(
        train.init(patch, optimizer), train.make_step(loss, optimizer), params, [data] * 60, steps=60
    )
    patch = train.patch_of(state)
    tuned = patches.apply(params, patch)
    assert jax.tree.structure(tuned) == jax.tree.structure(params)
    assert mean(tuned) < 0.7 * mean(params) and mean(tuned) < float(losses[0])

    # Exactly what the mask kept has moved, and a file brings it to another copy of the model.
    for name, kept in tree.flatten(mask).items():
        moved = np.asarray(tree.flatten(tuned)[name] != tree.flatten(params)[name])
        assert not (moved & ~np.asarray(kept)).any()
    assert (
        patches.num_parameters(patch)
        == masks.count(mask)
        == round(0.2 * sum(x.size for x in jax.tree.leaves(params)))
    )
    checkpoint.save_patch(tmp_path / "patch", patch, base=params)
    again, _ = checkpoint.load_patch(tmp_path / "patch")
    jax.tree.map(np.testing.assert_array_equal, patches.apply(params, again), tuned)
