"""Equal blocks in a scan give what they give one after another; patches go there and come back."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import mesh, models, patches, tree
from fishjax.errors import StructureError

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
IDS = np.random.default_rng(0).integers(2, 30, (2, 5)).astype(np.int32)
BATCH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


@pytest.mark.parametrize("case", ["t5_v1_1", "bert", "gpt2_deep", "gemma2"])
def test_a_scan_over_blocks_changes_nothing(case):
    model, params = models.load(FIXTURES / case)
    stacked = models.stack_blocks(model, params)
    # Blocks that differ in more than parameters (windows, scales by depth) are not in one scan.
    assert any("*" in n for n in tree.names(stacked)) == (case in ("t5_v1_1", "bert"))
    with jax.numpy_dtype_promotion("standard"):
        wanted = model.apply(params, BATCH)
        got = models.scanned(model, remat=case == "bert").apply(stacked, BATCH)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(stacked)) == sum(x.size for x in jax.tree.leaves(params))


def moved(patch):
    move = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape) if tree.is_inexact(x) else x
    return jax.tree.map(move, patch)


def made(model, params, kind):
    if kind == "scale":
        return patches.init_ia3(params, targets="paper")  # with tied biases
    if kind == "low_rank":
        return patches.init_lora(jax.random.key(0), params, rank=2, targets="paper")
    if kind == "dense":
        return patches.init_dense(params, "output.dense")
    mask = jax.tree.map(lambda x: x > jnp.percentile(x, 90), params)  # other counts in each block
    return patches.init_sparse(params, mask)


@pytest.mark.parametrize("kind", ["scale", "low_rank", "dense", "sparse"])
def test_a_patch_means_the_same_stacked_and_comes_back(kind):
    model, params = models.load(FIXTURES / "bert")
    patch = moved(made(model, params, kind))
    stacked = models.stack_patch(model, params, patch)
    assert any("*" in n for n in stacked) and len(stacked) < len(patch)
    wanted = models.stack_blocks(model, patches.apply(params, patch))
    got = patches.apply(models.stack_blocks(model, params), stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)
    back = models.unstack_patch(model, mesh.shapes_of(params), stacked)
    assert jax.tree.structure(back) == jax.tree.structure(dict(patch))
    jax.tree.map(np.testing.assert_array_equal, back, dict(patch))


def test_blocks_that_are_patched_differently_are_refused():
    model, params = models.load(FIXTURES / "bert")
    patch = patches.init_ia3(params, targets="paper")
    first = next(iter(patch))
    with pytest.raises(StructureError, match=r"is patched in 1 of 2 blocks"):
        models.stack_patch(model, params, {n: k for n, k in patch.items() if n == first})
    lora = patches.init_lora(jax.random.key(0), params, rank=2, targets="paper")
    first = next(iter(lora))
    with pytest.raises(StructureError, match=r"in 2 of 2 blocks and in 2 forms"):
        models.stack_patch(model, params, {**lora, first: dataclasses.replace(lora[first], scale=9.0)})


def test_stacked_leaves_are_divided_like_their_blocks():
    model, params = models.load(FIXTURES / "bert")
    on = mesh.make({"fsdp": 2, "tensor": 2})
    placed = mesh.shard(params, mesh.rules(model, on), on)
    stacked = models.stack_blocks(model, placed)
    by_rule = mesh.shardings(stacked, mesh.rules(models.scanned(model), on), on)
    for name, leaf in tree.flatten(stacked).items():
        assert leaf.sharding.is_equivalent_to(by_rule[name], leaf.ndim), name
    stage = jax.sharding.AbstractMesh((2,), ("stage",))
    spec = mesh.shardings(stacked, mesh.rules(models.scanned(model), stage), stage)
    assert tuple(spec["encoder.layer.*.attention.self.query.weight"].spec) == ("stage", None, None)
    models.stack_blocks(model, placed, donate=True)
    assert placed["encoder"]["layer"]["0"]["output"]["dense"]["weight"].is_deleted()
