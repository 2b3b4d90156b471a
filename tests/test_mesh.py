"""Parameters laid out by rules, all else laid out like them, and results that are those of one device."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fishjax import cli, leaves, mesh, models, patches, train, tree
from fishjax.errors import UsageError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def spec(x):
    return tuple(x.sharding.spec)


# Rules.


def test_the_first_rule_that_matches_decides():
    params = {"a": {"w": np.arange(32.0).reshape(8, 4), "b": np.zeros(4)}, "c": np.float32(1)}
    rules = [("w$", P("fsdp", "tensor")), ("^a", P("tensor")), ("", P())]
    placed = mesh.shard(params, rules, mesh.make(EIGHT))
    assert [spec(x) for x in jax.tree.leaves(placed)] == [("tensor",), ("fsdp", "tensor"), ()]
    assert placed["a"]["w"].addressable_shards[0].data.shape == (4, 2)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_a_dimension_that_its_axes_do_not_divide_is_left_whole():
    params = {"w": shape(6, 5), "v": shape(4, 8)}
    placed = mesh.shard(params, [("", P(("data", "fsdp"), "tensor"))], mesh.make(EIGHT))
    assert spec(placed["w"]) == (None, None) and spec(placed["v"]) == (("data", "fsdp"), "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel", P()), ("", P())], "rule `kernel` matches no leaf; near names: "),
        ([("scale", P())], "no sharding rule covers `dense.weight`; the rules are `scale`"),
        ([("", P("fsdp", None, None))], "more entries than `dense.weight` has dimensions: \\[4, 4\\]"),
        ([("", P("model"))], "needs the axis `model`; the mesh has data=2, fsdp=2, tensor=2"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    params = {"dense": {"weight": shape(4, 4)}, "scale": shape(4, 4, 4)}
    with pytest.raises(UsageError, match=message):
        mesh.shard(params, rules, mesh.make(EIGHT))


def test_a_mesh_needs_its_devices():
    assert mesh.make(EIGHT).axis_types == (AxisType.Auto,) * 3
    with pytest.raises(UsageError, match=r"fsdp=4, tensor=4 needs 16 devices; there are 8 \(cpu\)"):
        mesh.make({"fsdp": 4, "tensor": 4})
    for axes in ({}, {"data": 0}, {"data": 2.0}):
        with pytest.raises(UsageError, match="at least 1"):
            mesh.make(axes)


# Leaves of each family and their specs, by hand: a Linear is [out, in], a Conv1D [in, out].
OUT, IN = ("tensor", "fsdp"), ("fsdp", "tensor")
PLACES = {
    "t5_v1_1": {
        "encoder.block.0.layer.0.SelfAttention.k.weight": OUT,
        "decoder.block.1.layer.1.EncDecAttention.o.weight": IN,
        "decoder.block.0.layer.2.DenseReluDense.wi_1.weight": OUT,
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": IN,
        "lm_head.weight": (None, "fsdp"),  # of an odd vocabulary
        "decoder.final_layer_norm.weight": (None,),
    },
    "bert_classifier": {
        "bert.encoder.layer.0.attention.self.key.weight": OUT,
        "bert.encoder.layer.0.attention.self.key.bias": ("tensor",),
        "bert.encoder.layer.0.attention.output.dense.weight": IN,
        "bert.encoder.layer.1.output.dense.weight": IN,
        "bert.encoder.layer.1.output.dense.bias": (None,),
    },
    "roberta_masked": {"roberta.encoder.layer.0.intermediate.dense.weight": OUT},
    "bloom": {
        "transformer.h.0.self_attention.query_key_value.weight": OUT,
        "transformer.h.0.self_attention.dense.weight": IN,
        "transformer.h.0.mlp.dense_4h_to_h.weight": IN,
    },
    "llama3": {"model.layers.0.self_attn.q_proj.weight": OUT, "model.layers.0.mlp.down_proj.weight": IN},
    "qwen2": {"model.layers.0.self_attn.v_proj.bias": ("tensor",)},
    "mistral": {"model.layers.2.self_attn.o_proj.weight": IN, "model.layers.2.mlp.gate_proj.weight": OUT},
    "qwen3": {
        "model.layers.0.self_attn.k_proj.weight": OUT,
        "model.layers.0.self_attn.k_norm.weight": (None,),
    },
    "gemma2": {"model.layers.0.mlp.up_proj.weight": OUT},
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": ("fsdp", "tensor"),
        "transformer.h.0.mlp.c_proj.weight": ("tensor", "fsdp"),
        "transformer.h.0.attn.c_attn.bias": ("tensor",),
    },
}


@pytest.mark.parametrize("case", PLACES)
def test_every_family_has_rules_that_divide_its_matrices(case):
    model, params = models.load(FIXTURES / case)
    on = AbstractMesh((2, 2), ("fsdp", "tensor"))
    found = mesh.shardings(params, mesh.rules(model, on), on)
    assert {n: tuple(found[n].spec) for n in PLACES[case]} == PLACES[case]
    flat = tree.flatten(params)
    whole = [n for n, s in found.items() if flat[n].ndim > 1 and not any(s.spec)]
    # T5's tables of relative positions have a column a head, and the fixture an odd number of heads.
    assert all("relative" in n or all(d % 2 for d in flat[n].shape) for n in whole), whole
    assert set(models.FAMILIES) == set(mesh._rules.FAMILIES)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"foo": 4}, r"`foo` is no axis .*near names: `data`, `fsdp`, `tensor`, `stage`"),
        ({"data": 2, "tensors": 2}, "`tensors` is no axis .*near names: `tensor`"),
        ({"fsdp": 2, "stage": 2}, r"`stage` divides stacked blocks .*`mesh.pipelined`"),
    ],
)
def test_an_axis_that_would_divide_nothing_is_refused_by_name(axes, said, capsys):
    model = models.load(FIXTURES / "gpt2")[0]
    with pytest.raises(UsageError, match=said):
        mesh.rules(model, AbstractMesh(tuple(axes.values()), tuple(axes)))
    wanted = [f"{n}={size}" for n, size in axes.items()]
    assert cli.main(["plot", "mesh", str(FIXTURES / "gpt2"), "--axes", *wanted]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_axis_that_divides_no_leaf_is_warned_of():
    model = models.load(FIXTURES / "gpt2")[0]
    with pytest.warns(UserWarning, match=r"`tensor` \(61\) divides no leaf of this `gpt2`"):
        rules = mesh.rules(model, AbstractMesh((2, 61), ("data", "tensor")))
    assert rules[-1] == ("", P())
    mesh.rules(model, AbstractMesh((61, 1), ("data", "tensor")))  # examples, and one device: nothing to say


def test_heads_of_digits_are_divided():
    model = models.build({"model_type": "fishjax_digits"})
    on = AbstractMesh((2, 2), ("fsdp", "tensor"))
    found = mesh.shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh.rules(model, on), on)
    wanted = {
        "attention.query.kernel": ("fsdp", "tensor", None),
        "attention.query.bias": ("tensor", None),
        "attention.output.kernel": ("tensor", None, "fsdp"),
        "mlp_in.kernel": ("fsdp", "tensor"),
        "mlp_out.kernel": ("tensor", "fsdp"),
        "mlp_norm.scale": (None,),
    }
    assert {n: tuple(found[f"block_0.{n}"].spec) for n in wanted} == wanted


def test_loading_a_folder_lands_on_the_mesh():
    on = mesh.make({"fsdp": 4, "tensor": 2})
    model, plain = models.load(FIXTURES / "llama")
    _, placed = models.load(FIXTURES / "llama", shardings=mesh.shardings(plain, mesh.rules(model, on), on))
    jax.tree.map(np.testing.assert_array_equal, plain, placed)
    assert mesh.mesh_of(placed) == on and mesh.mesh_of(plain) is None


# What follows the parameters.


def test_patches_fishers_masks_and_moments_follow_their_leaves():
    on = mesh.make(EIGHT)
    params = {"b": {"w": jnp.ones((8, 4)), "v": jnp.ones(8)}, "w": jnp.ones((4, 4))}
    placed = mesh.shard(params, [("b.w", P("fsdp", "tensor")), ("v", P("fsdp")), ("", P(None, "tensor"))], on)
    patch = {
        "b.w": patches.Scale(jnp.ones((8, 1)), tied=(("b.v", (8,)),)),
        "w": patches.LowRank(jnp.ones((1, 4, 2)), jnp.ones((4, 1, 2))),
    }
    moved = mesh.follow(patch, placed)
    assert spec(moved["b.w"].vector) == ("fsdp", None)
    assert spec(moved["w"].a) == (None, "tensor", None) and spec(moved["w"].b) == (None, None, None)
    sparse = mesh.follow({"b.w": patches.Sparse(jnp.arange(4), jnp.ones(4))}, placed)["b.w"]
    assert spec(sparse.values) == spec(sparse.indices) == (None,)
    mask = mesh.follow(jax.tree.map(lambda x: x > 0, params), placed)
    assert jax.tree.map(spec, mask) == jax.tree.map(spec, placed)
    state = mesh.follow({"mu": patch, "dense": params, "count": jnp.int32(3)}, placed)
    assert spec(state["mu"]["b.w"].vector) == ("fsdp", None) and spec(state["count"]) == ()
    assert spec(state["dense"]["b"]["v"]) == ("fsdp",)
    again = mesh.follow(jax.eval_shape(lambda: state), placed)  # shapes, to compile ahead of time
    assert jax.tree.map(spec, again) == jax.tree.map(spec, state)


def test_patches_side_by_side_are_divided_like_their_leaf_behind_the_axis_of_patches():
    on = mesh.make(EIGHT)
    placed = mesh.shard(
        {"w": jnp.ones((8, 4)), "v": jnp.ones(8)}, [("w", P("fsdp", "tensor")), ("v", P("fsdp"))], on
    )
    scale = {"w": patches.Scale(jnp.ones((8, 1))), "v": patches.Dense(jnp.ones(8))}
    low_rank = {"w": patches.LowRank(jnp.ones((1, 4, 2)), jnp.ones((8, 1, 2)))}
    state = train.init(patches.stack([scale, low_rank, scale, low_rank]), optax.sgd(0.1, momentum=0.9))
    moved = mesh.follow(state, placed)
    for held in (moved.trainable, moved.opt_state[0].trace):
        first, second = held.layers
        assert spec(first["w"].kind.vector) == (None, "fsdp", None)  # [2, 8, 1]
        assert spec(first["v"].kind.values) == (None, "fsdp")
        assert spec(second["w"].kind.a) == (None, None, "tensor", None)
        assert spec(second["w"].kind.b) == (None, "fsdp", None, None)


def test_an_array_type_leaf_is_one_leaf_divided_like_it():
    on = mesh.make(EIGHT)
    params = {"w": leaves.Scaled(jnp.ones((8, 4)), jnp.ones((8, 1))), "b": jnp.ones(4)}
    placed = mesh.shard(params, [("^w$", P("fsdp", "tensor")), ("b", P())], on)
    assert spec(placed["w"].w) == ("fsdp", "tensor") and mesh.mesh_of(placed) == on
    assert all(spec(x)[0] == "fsdp" for x in jax.tree.leaves(placed["w"]))
    patch = mesh.follow({"w": patches.Scale(jnp.ones((1, 4)))}, placed)
    assert spec(patch["w"].vector) == (None, "tensor")


def test_batches_are_spread_over_the_axes_for_examples():
    batch = {"x": np.ones((8, 3)), "odd": np.ones((6, 3)), "n": np.float32(1)}
    placed = mesh.shard_batch(batch, mesh.make(EIGHT))
    assert spec(placed["x"]) == (("data", "fsdp"), None)
    assert spec(placed["odd"]) == (None, None) and spec(placed["n"]) == ()
    assert spec(mesh.shard_batch(batch, mesh.make({"tensor": 2}))["x"]) == (None, None)


def test_on_one_device_nothing_changes():
    params = {"w": jnp.ones((8, 4))}
    patch = {"w": patches.Scale(jnp.ones((8, 1)))}
    assert mesh.follow(patch, params) is patch and mesh.shard_batch(patch, mesh.mesh_of(params)) is patch
    assert isinstance(params["w"].sharding, SingleDeviceSharding)
