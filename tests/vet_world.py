"""A small world to vet patches in: a base, a patch that helps, and tests that were held back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fishjax import patches, vet

CLASSES, WIDTH = 4, 8
CENTRES = np.random.default_rng(1).normal(size=(CLASSES, WIDTH)).astype(np.float32) * 2


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(16, name="block_0")(x)))


def apply(params, batch):
    return MLP().apply({"params": params}, batch["x"])


def examples(n, seed, mirrored=False):
    """Points around one centre a class; in the other world their axes come in reverse."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    x = CENTRES[label] + 0.5 * rng.normal(size=(n, WIDTH)).astype(np.float32)
    return {"x": (x[:, ::-1] if mirrored else x).astype(np.float32), "label": label}


def train(params, *batches, steps=300):
    def loss(p):
        return sum(
            -jnp.take_along_axis(jax.nn.log_softmax(apply(p, b)), jnp.asarray(b["label"])[:, None], 1).mean()
            for b in batches
        )

    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p)))
    for _ in range(steps):
        params = step(params)
    return params


@functools.cache
def make():
    """A base, a good patch that raises the mirrored world, and held packs of both worlds."""
    old, new = examples(400, 0), examples(400, 2, mirrored=True)
    base = train(MLP().init(jax.random.key(0), old["x"][:1])["params"], old)
    good = patches.diff(base, train(base, old, new, steps=400))
    held = (vet.pack("held", examples(600, 3)), vet.pack("mirrored", examples(600, 4, mirrored=True)))
    return base, good, held


def context(world, patch=None, **fields):
    base, good, held = world
    given = {"tests": held, "metadata": {"claims": ["mirrored"]}, **fields}
    return vet.Context(good if patch is None else patch, base, apply, **given)


def finding(report, name):
    return next(f for f in report.findings if f.name == name)
