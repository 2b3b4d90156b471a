"""Patch files: round trips of every kind, and every way in which a file can be wrong."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fishjax import checkpoint, patches, tree
from fishjax.errors import FileFormatError, StructureError, UsageError

RNG = np.random.default_rng(0)


@pytest.fixture
def base():
    return {
        "layer": {
            "kernel": RNG.normal(size=(6, 8)).astype(np.float32),
            "bias": RNG.normal(size=8).astype(np.float32),
        },
        "half": RNG.normal(size=(4, 4)).astype(ml_dtypes.bfloat16),
        "table": RNG.normal(size=(50, 40)).astype(np.float32),
    }


@pytest.fixture
def patch(base):
    where = np.sort(RNG.choice(2000, 20, replace=False)).astype(np.int32)
    return {
        "layer.kernel": patches.Scale(jnp.full((1, 8), 1.5), tied=(("layer.bias", (8,)),)),
        "half": patches.LowRank(jnp.ones((4, 1, 2)), jnp.full((1, 4, 2), 0.25), scale=0.5),
        "table": patches.Sparse(where, RNG.normal(size=20).astype(np.float32)),
    }


def test_every_kind_comes_back_as_it_was(tmp_path, base, patch):
    patch["layer.kernel"] = patches.Dense(jnp.zeros((6, 8)))
    metadata = {"author": "ada", "recipe": {"density": 0.005, "seed": 3}, "parents": []}
    checkpoint.save_patch(tmp_path / "p", patch, base=base, metadata=metadata)
    got, told = checkpoint.load_patch(tmp_path / "p")
    assert told == metadata and set(got) == set(patch)
    for name, kind in patch.items():
        assert type(got[name]) is type(kind)
        for field in vars(kind):
            np.testing.assert_array_equal(getattr(got[name], field), getattr(kind, field))


def test_equal_patches_make_equal_files(tmp_path, base, patch):
    one = checkpoint.save_patch(tmp_path / "1", patch, base=base)
    two = checkpoint.save_patch(tmp_path / "2", dict(reversed(patch.items())), base=base)
    assert one == two and (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_manifest_tells_base_and_results(tmp_path, base, patch):
    checkpoint.save_patch(tmp_path / "p", patch, base=base)
    file = checkpoint.read_patch(tmp_path / "p")
    tuned = tree.flatten(patches.apply(tree.map_named(lambda _, x: jnp.asarray(x), base), patch))
    assert file.base_id == checkpoint.digest(base)
    assert set(file.base_digests) == {"layer.kernel", "layer.bias", "half", "table"}
    assert set(file.result_digests) == {"layer.kernel", "layer.bias", "table"}  # low rank is not exact
    for name, digest in file.result_digests.items():
        assert digest == checkpoint.digest({name: tuned[name]})


def test_any_flipped_bit_is_found(tmp_path):
    base = {"w": np.arange(16, dtype=np.float32)}
    file = tmp_path / "p"
    checkpoint.save_patch(file, {"w": patches.Sparse(np.array([3]), np.float32([1.5]))}, base=base)
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(FileFormatError):
            checkpoint.read_patch(file)


def test_truncated_or_extended_files_are_refused(tmp_path):
    base = {"w": np.arange(16, dtype=np.float32)}
    file = tmp_path / "p"
    checkpoint.save_patch(file, {"w": patches.Sparse(np.array([3]), np.float32([1.5]))}, base=base)
    good = file.read_bytes()
    for end in range(len(good)):
        file.write_bytes(good[:end])
        with pytest.raises(FileFormatError):
            checkpoint.read_patch(file)
    for extra in range(1, 65):
        file.write_bytes(good + bytes(extra))
        with pytest.raises(FileFormatError):
            checkpoint.read_patch(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(tmp_path, base, value):
    bad = {"layer.bias": patches.Dense(np.full(8, value, np.float32))}
    with pytest.raises(StructureError, match=r"`layer.bias::values` holds NaN"):
        checkpoint.save_patch(tmp_path / "p", bad, base=base)
    assert list(tmp_path.iterdir()) == []


def test_small_floats_and_minus_zero_are_kept(tmp_path):
    values = np.float32([-0.0, 1e-45, -1e-40, 3.4e38])
    checkpoint.save_patch(tmp_path / "p", {"w": patches.Dense(values)}, base={"w": np.zeros(4, np.float32)})
    got = checkpoint.load_patch(tmp_path / "p")[0]["w"].values
    assert got.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "indices", [[16], [-1], [3, 2], [3, 3], [2**32 + 5], [2**62], [0, 2**63 - 1, -2, 3]], ids=lambda x: str(x)
)
def test_bad_indices_are_refused_before_writing(tmp_path, indices):
    bad = {"w": patches.Sparse(np.array(indices, np.int64), np.zeros(len(indices), np.float32))}
    with pytest.raises(StructureError, match="`w`"):
        checkpoint.save_patch(tmp_path / "p", bad, base={"w": np.zeros(16, np.float32)})


def test_metadata_must_be_json(tmp_path, base):
    for bad in ({"x": object()}, {"x": float("nan")}, {"x": "\ud800"}):
        with pytest.raises(UsageError, match="`metadata`"):
            checkpoint.save_patch(tmp_path / "p", {}, base=base, metadata=bad)


def test_a_sparse_patch_is_small(tmp_path):
    size, density = 1_000_000, 0.005
    base = {"w": np.zeros(size, np.float32)}
    where = np.sort(RNG.choice(size, int(size * density), replace=False)).astype(np.int32)
    checkpoint.save_patch(
        tmp_path / "p", {"w": patches.Sparse(where, np.ones(len(where), np.float32))}, base=base
    )
    bits = 8 * ((tmp_path / "p").stat().st_size - 4 * len(where)) / len(where)
    entropy = (-density * np.log2(density) - (1 - density) * np.log2(1 - density)) / density
    assert bits < 1.03 * entropy + 8 * 1500 / len(where)  # the manifest takes less than 1500 bytes


def test_the_safetensors_package_reads_it(tmp_path, base, patch):
    from safetensors import safe_open

    checkpoint.save_patch(tmp_path / "p", patch, base=base)
    with safe_open(tmp_path / "p", "numpy") as file:
        assert json.loads(file.metadata()["fishjax"])["format"] == "patch"
        np.testing.assert_array_equal(file.get_tensor("table::values"), patch["table"].values)


def test_an_empty_patch(tmp_path, base):
    checkpoint.save_patch(tmp_path / "p", {}, base=base)
    assert checkpoint.load_patch(tmp_path / "p") == ({}, {})


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int32, np.int64, ">i8"])
def test_indices_of_any_integer_dtype(tmp_path, dtype):
    base = {"w": np.arange(300, dtype=">f4")}
    patch = {"w": patches.Sparse(np.array([3, 299], dtype), np.array([1, 2], ">f4"))}
    checkpoint.save_patch(tmp_path / "p", patch, base=base)
    got = checkpoint.load_patch(tmp_path / "p")[0]["w"]
    assert got.indices.tolist() == [3, 299] and got.values.tolist() == [1, 2]
    assert got.indices.dtype == (np.int64 if np.dtype(dtype).itemsize == 8 else np.int32)


def test_values_are_stored_in_the_dtype_of_their_leaf(tmp_path, base):
    values = np.float32([1.001, 2, 3e38])
    patch = {"half": patches.Sparse(np.array([0, 1, 2], np.int32), values)}
    checkpoint.save_patch(tmp_path / "p", patch, base=base)
    got = checkpoint.load_patch(tmp_path / "p")[0]
    assert got["half"].values.dtype == ml_dtypes.bfloat16
    params = {"half": jnp.asarray(base["half"])}
    np.testing.assert_array_equal(patches.apply(params, got)["half"], patches.apply(params, patch)["half"])


@pytest.mark.parametrize(
    "odd, match",
    [
        ({"nowhere": patches.Dense(np.zeros(3))}, "`nowhere`, which the base does not have"),
        ({"half": patches.Dense(np.zeros(3))}, r"shape \[3\], the leaf \[4, 4\]"),
        ({"half": np.zeros((4, 4))}, "wanted one of dense"),
        ({"half": patches.LowRank(np.zeros((4, 1, 2)), np.zeros((1, 3, 2)))}, "do not span"),
        (
            {"half": patches.LowRank(np.zeros((4, 1, 2)), np.zeros((1, 4, 2)), scale=float("nan"))},
            "its scale is nan",
        ),
        (
            {
                "layer.bias": patches.Dense(np.zeros(8, np.float32)),
                "layer.kernel": patches.Scale(np.ones((1, 8)), tied=(("layer.bias", (8,)),)),
            },
            "`layer.bias` is changed by both",
        ),
    ],
)
def test_patches_that_do_not_fit(tmp_path, base, odd, match):
    with pytest.raises((StructureError, UsageError), match=match):
        checkpoint.save_patch(tmp_path / "p", odd, base=base)
    assert list(tmp_path.iterdir()) == []
