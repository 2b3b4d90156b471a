"""The one-pass Fisher against the reference: operations of every kind, and random programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import fisher
from fishjax.fisher import _one_pass, _squares
from tests.fisher_programs import OPERATIONS, batch, compare, program, set_limits

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def limits(monkeypatch):
    return functools.partial(set_limits, monkeypatch)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation(x64, limits, operation, shared):
    limits()
    loss, params = program(["gelu", operation, "dense"], share=[shared] * 9)
    compare(loss, params, batch(), 1e-5 if "cast" in operation else 1e-10)


@pytest.mark.parametrize(
    "operation", ["dense", "embed", "embed_tied", "scan", "attend", "scan_constant", "conv"]
)
def test_examples_one_at_a_time_in_groups_and_beside_padding(x64, limits, operation):
    limits(held=1)
    loss, params = program([operation, "dense"], share=[])
    compare(loss, params, batch(), chunk_size=3)
    limits(held=40)
    compare(loss, params, batch(), chunk_size=2)


@pytest.mark.parametrize(
    "operations",
    [
        [
            "embed",
            "embed_constant",
            "gelu",
        ],  # a lookup that is the same for every example beside one that is not
        ["embed_clipped", "embed_dropped"],
        ["embed_constant", "embed_tied", "embed"],
        ["dense", "scan_constant", "dense_transposed"],
        ["barrier", "dense_of_product"],
    ],
)
def test_shared_parameters(x64, limits, operations):
    limits()
    loss, params = program(operations, share=[True] * 9)
    compare(loss, params, batch())


@pytest.mark.parametrize(
    "operations, at_once",
    [
        (["embed_tied", "dense", "scan_constant"], 1),
        (["embed_tied", "dense", "scan_constant"], 2),
        (["embed_tied", "attend", "scan_constant"], 8),
        (["cond", "conv", "scan", "untouched"], 8),
    ],
)
def test_rows_go_backward_together(x64, limits, monkeypatch, operations, at_once):
    """Three rows in one, two (one of them half empty) and three backward passes."""
    limits()
    monkeypatch.setattr(_one_pass, "MOST_ROWS_AT_ONCE", at_once)
    run, params = program(operations, share=[True, False] * 4, read=lambda h: jnp.sin(h).mean(0)[:4])
    compare(run, params, batch(), estimator=fisher.exact)


ROOM = st.sampled_from([(2**22, 0, 2**16), (2**22, 2**14, 1), (8, 0, 40), (8, 2**14, 2**16)])


@given(
    st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=5),
    st.lists(st.booleans(), max_size=8),
    ROOM,
)
def test_random_programs(operations, share, room):
    """Silently wrong is impossible: shared, sliced, cast, scanned parameters in any mixture."""
    before = _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"]
    _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"] = room
    try:
        with jax.enable_x64(True):
            loss, params = program(operations, share)
            if params:
                compare(loss, params, batch(), 1e-4 if "dense_cast" in operations else 1e-9)
    finally:
        _one_pass.MOST_COPIED, _one_pass.FEW, _squares.HELD["cpu"] = before
