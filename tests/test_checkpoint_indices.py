"""Coded positions: every sequence comes back, the smaller code is taken, and a bomb stays small."""

import bz2
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishjax import checkpoint, patches
from fishjax.checkpoint import _gaps, _indices, _rice
from fishjax.errors import FileFormatError

RNG = np.random.default_rng(0)
GAPS = st.one_of(st.integers(0, 300), st.integers(0, 2**40), st.just(2**61))


@given(st.lists(GAPS, max_size=40).filter(lambda g: sum(g) + len(g) < 2**62))
def test_gaps_come_back(gaps):
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    np.testing.assert_array_equal(_gaps.decode(_gaps.encode(positions), len(gaps)), positions)


def limit(size, kept):
    """Bytes that a set of `kept` of `size` entries needs, if all are alike: log2 C(n, k) / 8."""
    return (math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)) / math.log(2) / 8


def test_uniform_positions_reach_the_entropy_bound():
    where = np.flatnonzero(RNG.random(4_000_000) < 0.005)
    note, stream = _indices.encode(where)
    assert note["encoding"] == "rice" and stream.nbytes < 1.01 * limit(4_000_000, where.size)
    np.testing.assert_array_equal(_indices.decode("f", note, stream, "it"), where)


def test_clustered_positions_are_packed_far_below_it():
    columns = np.sort(RNG.choice(800, 4, replace=False))
    rows = np.flatnonzero(RNG.random(5000) < 0.97)
    where = (rows[:, None] * 800 + columns).reshape(-1)
    note, stream = _indices.encode(where)
    assert note["encoding"] == "gaps" and stream.nbytes < 0.2 * limit(4_000_000, where.size)
    assert stream.nbytes < 0.2 * _rice.encode(where)[1].nbytes
    np.testing.assert_array_equal(_indices.decode("f", note, stream, "it"), where)


def test_a_bomb_is_refused_before_it_grows():
    bomb = np.frombuffer(bz2.compress(bytes(300_000_000)), np.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not hold 300000000"):
        _gaps.decode(bomb, 300_000_000)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert _gaps.encode(np.arange(10_000_000)) is None  # what cannot be read is not written


@pytest.mark.parametrize(
    ("plain", "count"),
    [
        (b"\x01\x81", 2),  # ends within a gap
        (b"\x81\x00", 1),  # longer than it needs to be
        (b"\x01\x01", 1),
        (b"\x01", 2),
        (b"\x01", -1),
        (b"\x80" * 9 + b"\x01", 1),  # 2^63
        (b"\xff" * 8 + b"\x7f" + b"\x01", 2),  # a sum beyond
    ],
)
def test_malformed_gaps(plain, count):
    with pytest.raises(ValueError):
        _gaps.decode(np.frombuffer(bz2.compress(plain), np.uint8), count)


def test_malformed_streams():
    good = bz2.compress(b"\x01\x02")
    for bad in (b"", good[:-1], good + b"x", good + good, b"x" + good):
        with pytest.raises(ValueError):
            _gaps.decode(np.frombuffer(bad, np.uint8), 2)


def test_patch_and_mask_files_take_the_smaller_code(tmp_path):
    rows = np.flatnonzero(RNG.random(1000) < 0.9)
    where = (rows[:, None] * 100 + np.array([3, 50])).reshape(-1)
    base = {"w": np.zeros((1000, 100), np.float32)}
    values = RNG.normal(size=where.size).astype(np.float32)
    checkpoint.save_patch(tmp_path / "p", {"w": patches.Sparse(where.astype(np.int32), values)}, base=base)
    got = checkpoint.load_patch(tmp_path / "p")[0]["w"]
    np.testing.assert_array_equal(got.indices, where)
    assert (tmp_path / "p").stat().st_size < 4 * where.size + 2000
    mask = {"w": np.zeros((1000, 100), bool)}
    mask["w"].reshape(-1)[where] = True
    checkpoint.save_mask(tmp_path / "m", mask)
    np.testing.assert_array_equal(checkpoint.load_mask(tmp_path / "m")[0]["w"], mask["w"])
    from fishjax.checkpoint._manifest import read_sealed, write_sealed

    for name, key in (("p", "patch"), ("m", "mask")):
        manifest, tensors, _ = read_sealed(tmp_path / name)
        note = manifest["changes"]["w"]["indices"] if key == "patch" else manifest["leaves"]["w"]
        assert note["encoding"] == "gaps"
        note["count"] += 1
        write_sealed(
            tmp_path / "lie",
            key,
            {k: v for k, v in manifest.items() if k not in ("format", "version")},
            tensors,
        )
        with pytest.raises(FileFormatError, match=r"does not hold|do not pair"):
            (checkpoint.load_patch if key == "patch" else checkpoint.load_mask)(tmp_path / "lie")
