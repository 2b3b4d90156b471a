"""The strict reader and the writer: every dtype, layout and name is kept, byte for byte as by the package."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fishjax.checkpoint._dtypes import DTYPES, Spec
from fishjax.checkpoint._safetensors import open_file, write_file
from fishjax.errors import StructureError


def save(path, tensors, **options):
    write_file(path, {n: Spec(x.dtype, x.shape) for n, x in tensors.items()}, tensors.__getitem__, **options)


def load(path):
    with open_file(path) as file:
        return {n: file[n] for n in file}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_kept_bit_by_bit(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "BOOL" else 256, 240, np.uint8)
    array = bits.view(DTYPES[dtype]).reshape(-1, 5)  # NaN payloads and subnormals among them
    save(tmp_path / "a", {"x": array})
    got = load(tmp_path / "a")["x"]
    assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()


def test_bytes_equal_those_of_the_package(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.float32),
        "c": np.arange(5, dtype=np.int8),
        "d": np.array(2.5),
        "e": np.zeros((0, 4), np.float16),
        "é": np.ones(2, ml_dtypes.bfloat16).view(np.uint16),
    }
    save(tmp_path / "a", tensors, metadata={"format": "pt"})
    assert (tmp_path / "a").read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


BIG = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "array",
    {
        "transposed": BIG.T,
        "strided": BIG[:, ::2, 1::2],
        "reversed": BIG[::-1, :, ::-1],
        "broadcast": np.broadcast_to(np.float32([1, 2]), (3, 2)),
        "fortran": np.asfortranarray(BIG),
        "big-endian": BIG.astype(">f4"),
        "big-endian, transposed": BIG.astype(">f4").T,
        "0-d": np.float32(3).reshape(()),
        "zero-size": BIG[:0],
        "read-only": (lambda x: (x.setflags(write=False), x)[1])(BIG.copy()),
        "bfloat16, transposed": BIG.astype(ml_dtypes.bfloat16).T,
    }.items(),
    ids=lambda item: item[0],
)
def test_any_layout_is_written_right(tmp_path, array):
    save(tmp_path / "a", {"x": array[1]})
    got = load(tmp_path / "a")["x"]
    np.testing.assert_array_equal(got.astype(np.float64), array[1].astype(np.float64))
    assert got.shape == array[1].shape


def test_arrays_longer_than_a_chunk(tmp_path):
    long = np.random.default_rng(0).normal(size=(3_000_001, 2)).astype(np.float32)  # 24 MB
    save(tmp_path / "a", {"x": long.T})
    np.testing.assert_array_equal(load(tmp_path / "a")["x"], long.T)


@pytest.mark.parametrize("dtype", [np.complex128, "U3", "M8[s]", object, np.longdouble, ml_dtypes.int4])
def test_dtypes_that_cannot_be_kept_are_refused(tmp_path, dtype):
    with pytest.raises(StructureError, match="leaf `x` has dtype"):
        save(tmp_path / "a", {"x": np.zeros(2, dtype)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["CON", "a b", "é", "重み", "a::b", "x" * 60000, "A", "a-1_2/3"])
def test_odd_names_are_kept(tmp_path, name):
    save(tmp_path / "a", {name: np.ones(2, np.float32)})
    assert list(load(tmp_path / "a")) == [name]


def test_pieces_and_announcements_must_agree(tmp_path):
    spec = {"x": Spec(np.dtype(np.float32), (4,))}
    write_file(tmp_path / "a", spec, lambda _: iter([np.float32([1]), np.float32([2, 3, 4])]))
    np.testing.assert_array_equal(load(tmp_path / "a")["x"], [1, 2, 3, 4])
    for wrong in (np.ones(3, np.float32), np.ones(5, np.float32), np.ones(4, np.int32)):
        with pytest.raises(StructureError, match="`x` was announced"):
            write_file(tmp_path / "b", spec, {"x": wrong}.get)
    assert os.listdir(tmp_path) == ["a"]


def test_reading_a_part(tmp_path):
    save(tmp_path / "a", {"x": BIG, "y": np.arange(3, dtype=np.int8)})
    with open_file(tmp_path / "a") as file:
        np.testing.assert_array_equal(file.read_flat("x", 5, 11), np.arange(5, 11))
        assert file.read_flat("y", 3, 3).size == 0
        for start, stop in ((0, 25), (-1, 3), (5, 4)):
            with pytest.raises(ValueError, match="`x` has no entries"):
                file.read_flat("x", start, stop)


def test_what_is_not_held_is_not_in_memory(tmp_path):
    mapped = lambda: Path("/proc/self/maps").read_text().count(str(tmp_path))
    save(tmp_path / "a", {str(i): np.ones(1000) for i in range(20)})
    with open_file(tmp_path / "a") as file:
        arrays = [file[name] for name in file]
        assert mapped() >= 1
        del arrays
        assert mapped() == 0
