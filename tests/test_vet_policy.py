"""Policies: every key explained, every value checked, nothing unknown let through."""

import pathlib

import pytest
import yaml

from fishjax import vet
from fishjax.errors import UsageError


def test_the_template_explains_every_key_and_holds_the_defaults():
    assert set(yaml.safe_load(vet.TEMPLATE)) == set(vet.Policy._fields)
    assert vet.policy(yaml.safe_load(vet.TEMPLATE)) == vet.Policy()


def test_the_example_policy_loads():
    policy = vet.load_policy(pathlib.Path(__file__).parent.parent / "configs" / "vet.yaml")
    assert policy.require_tests and policy != vet.Policy()


def test_a_test_may_have_limits_of_its_own():
    policy = vet.policy({"min_gain": 0.02, "tests": {"rotated": {"min_gain": 0.1}}})
    assert policy.limit("min_gain", "rotated") == 0.1 and policy.limit("min_gain", "held") == 0.02


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_paramters": 3}, "near names: `max_parameters`"),
        ({"tests": {"a": {"nfr": 0.1}}}, "nfr_budget"),
        ({"tests": {"a": {"confidence": 0.9}}}, "no key `confidence`"),
        ({"tests": [1]}, "map"),
        ({"max_parameters": 0}, "at least 1"),
        ({"max_parameters": 1.5}, "whole"),
        ({"max_parameters": True}, "whole"),
        ({"max_bytes": "1 MB"}, "whole"),
        ({"max_fraction": 0}, r"\(0, 1\]"),
        ({"max_fraction": 1.5}, r"\(0, 1\]"),
        ({"nfr_budget": 0}, r"\(0, 1\)"),
        ({"nfr_budget": float("nan")}, r"\(0, 1\)"),
        ({"nfr_budget": "2 %"}, "number"),
        ({"nfr_budget": None}, "number"),
        ({"max_kl": float("inf")}, "inf"),
        ({"confidence": 0.4}, r"\(0.5, 1\)"),
        ({"min_gain": 1}, r"\[0, 1\)"),
        ({"require_tests": "yes"}, "true or false"),
        ({"allowed": "head"}, "list"),
        ({"forbidden": ["("]}, "no regex"),
        ({3: 1}, "no key `3`"),
    ],
)
def test_bad_policies_are_refused_by_name(values, says):
    with pytest.raises(UsageError, match=says):
        vet.policy(values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "mapping"),
        ("", "mapping"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_policy_files_that_are_none_are_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        vet.load_policy(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


def test_a_policy_that_says_a_key_twice_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("nfr_budget: 0.01\nnfr_budget: 0.9\n")
    with pytest.raises(UsageError, match="twice"):
        vet.load_policy(tmp_path / "p.yaml")
