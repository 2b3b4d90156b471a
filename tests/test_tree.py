"""Names, rules and the structure check over nested dicts, Linen params and nnx.State."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fishjax import tree
from fishjax.errors import StructureError, UsageError


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4, 3):
            x = nn.Dense(width)(x)
        return x


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])


def test_names_of_linen_params_are_dotted_paths():
    params = Net().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert tree.names(params) == ["Dense_0.bias", "Dense_0.kernel", "Dense_1.bias", "Dense_1.kernel"]


def test_names_of_nnx_state_leave_out_the_variable():
    state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
    assert tree.names(state) == [
        "layers.0.bias",
        "layers.0.kernel",
        "layers.1.bias",
        "layers.1.kernel",
    ]
    doubled = tree.map_named(lambda name, x: x * 2, state)
    assert isinstance(doubled, nnx.State)
    np.testing.assert_array_equal(doubled["layers"][1]["kernel"][...], 2 * state["layers"][1]["kernel"][...])


def test_flatten_has_the_order_of_jax_with_and_without_jax():
    nested = {"layers_10": {"b": 0.0, "a": 1.0}, "layers_2": {"x": 2.0}, "A": 3.0}
    assert list(tree.flatten(nested).values()) == jax.tree.leaves(nested)
    assert tree.names(nested) == tree.names((nested,))[:0] + [n[2:] for n in tree.names((nested,))]


def test_nest_undoes_flatten():
    nested = {"a": {"b": {"c": 1.0}, "d": 2.0}, "e": 3.0}
    assert tree.nest(tree.flatten(nested)) == nested


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 1, "a": 2}, {"a..b": 1}, {"": 1}, {"a.": 1}])
def test_nest_refuses_names_that_are_no_tree(flat):
    with pytest.raises(StructureError):
        tree.nest(flat)


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(StructureError, match=r"`a\.b` more than once"):
        tree.flatten({"a.b": 1.0, "a": {"b": 2.0}})


def test_first_rule_wins_and_names_without_a_rule_are_left_out():
    rules = [("bias$", "b"), ("^enc", "e")]
    assert tree.match(rules, ["enc.bias", "enc.kernel", "dec.kernel"]) == {
        "enc.bias": "b",
        "enc.kernel": "e",
    }


def test_a_rule_that_matches_nothing_lists_near_names():
    with pytest.raises(UsageError, match=r"`encoder\.kernal` matches no leaf.*`encoder\.kernel`"):
        tree.match([("encoder.kernal", 0)], ["encoder.kernel", "encoder.bias", "head.kernel"])
    with pytest.raises(UsageError, match="not a regular expression"):
        tree.match([("(", 0)], ["a"])


def test_structure_check_prints_both_sides():
    base = {"w": jnp.ones((2, 3)), "only_a": jnp.ones(1)}
    with pytest.raises(StructureError, match=r"only in base: `only_a`; only in tuned: `only_b`"):
        tree.check_same(base, {"w": jnp.ones((2, 3)), "only_b": jnp.ones(1)}, ("base", "tuned"))
    with pytest.raises(StructureError, match=r"float32\[2,3\] in base and float32\[3,2\] in tuned"):
        tree.check_same({"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))}, ("base", "tuned"))
    with pytest.raises(StructureError, match=r"float32\[2\] in a and bfloat16\[2\] in b"):
        tree.check_same({"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)}, ("a", "b"))
    tree.check_same({"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)}, ("a", "b"), dtypes=False)


def test_partition_and_combine_are_inverse():
    whole = {"values": jnp.ones(2, jnp.bfloat16), "indices": jnp.arange(2)}
    floats, rest = tree.partition(whole, tree.is_inexact)
    assert floats["indices"] is None and rest["values"] is None
    jax.tree.map(np.testing.assert_array_equal, tree.combine(floats, rest), whole)
