"""Laws that every member of a family keeps: patch kinds, merge methods, model families.

A new member is picked up from `patches.KINDS`, `merge.METHODS` or `models.FAMILIES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import patches
from tests.test_patches import moved, params, started

# Ways to start a patch, and the kind that each one makes.
WAYS = {k: k for k in sorted(patches.KINDS)} | {
    "bitfit": "dense",
    "keys_values": "scale",
    "norms": "dense",
    "prompt": "sparse",
    "rslora": "low_rank",
}
KINDS = list(WAYS)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_patch_changes_nothing(kind):
    assert {type(k) for k in started(kind).values()} == {patches.KINDS[WAYS[kind]]}
    same(patches.apply(params(), started(kind)), params())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_keeps_names_shapes_and_dtypes(kind, dtype):
    new = patches.apply(params(dtype), moved(started(kind, dtype)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params(dtype)
    )
    changed = [
        n
        for n, (a, b) in enumerate(zip(jax.tree.leaves(new), jax.tree.leaves(params(dtype))))
        if (a != b).any()
    ]
    assert changed, "the moved patch must change something, or these tests show nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_apply_is_the_same_under_jit(kind):
    patch = moved(started(kind))
    jitted = jax.jit(patches.apply)(params(), patch)
    # XLA fuses the multiply and add of a low-rank product into one rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), jitted, patches.apply(params(), patch)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unfolded_is_folded(kind, x64):
    base, patch = params(jnp.float64), moved(started(kind, jnp.float64))

    def fn(p, ids):
        x = jnp.take(p["wte"]["weight"], ids, axis=0) * p["ln"]["scale"][None]
        heads = jnp.einsum("bd,dhk->bhk", x, p["attn"]["k"]["kernel"]) + p["attn"]["k"]["bias"][None]
        return heads, x @ p["mlp"]["kernel"] + p["mlp"]["bias"][None]

    ids = jnp.array([1, 4, 0])
    got, want = jax.jit(patches.unfolded(fn))(base, patch, ids), jax.jit(fn)(patches.apply(base, patch), ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_is_differentiable_in_what_is_trained(kind, x64):
    base, patch = params(jnp.float64), moved(started(kind, jnp.float64))
    trainable, fixed = patches.partition(patch)

    def loss(t):
        return sum((x**3).sum() for x in jax.tree.leaves(patches.apply(base, patches.combine(t, fixed))))

    direction = jax.tree.map(jnp.ones_like, trainable)
    slope = jax.jvp(loss, (trainable,), (direction,))[1]
    eps = 1e-6
    up, down = (loss(jax.tree.map(lambda x, e=e: x + e, trainable)) for e in (eps, -eps))
    np.testing.assert_allclose(slope, (up - down) / (2 * eps), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_partition_and_combine_are_inverse(kind):
    patch = moved(started(kind))
    same(patches.combine(*patches.partition(patch)), patch)
    assert all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(patches.partition(patch)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_diff_of_a_patched_tree_gives_it_back(kind):
    tuned = patches.apply(params(), moved(started(kind)))
    same(patches.apply(params(), patches.diff(params(), tuned)), tuned)
