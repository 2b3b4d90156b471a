"""Fisher and mask files."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fishjax import checkpoint, tree
from fishjax.checkpoint._manifest import read_sealed, write_sealed
from fishjax.errors import FileFormatError, StructureError

FISHER = {
    "a": {"w": np.random.default_rng(0).gamma(0.1, size=(5, 6)).astype(np.float32)},
    "b": np.float32([0, 1e-45, 3e38]),
    "c": np.ones(3, ml_dtypes.bfloat16),
}
RECIPE = {
    "estimator": "empirical",
    "examples": 128,
    "seed": 0,
    "data": "digits",
    "base": "sha256:" + "0" * 64,
}


def test_a_fisher_comes_back_with_its_recipe(tmp_path):
    checkpoint.save_fisher(tmp_path / "f", FISHER, metadata=RECIPE)
    got, recipe = checkpoint.load_fisher(tmp_path / "f")
    assert recipe == RECIPE and checkpoint.digest(got) == checkpoint.digest(FISHER)


@pytest.mark.parametrize("bad", [[-1e-9, 1], [np.nan, 1], [np.inf, 1]])
def test_a_fisher_is_finite_and_not_negative(tmp_path, bad):
    with pytest.raises(StructureError, match=r"`w.x` holds an entry"):
        checkpoint.save_fisher(tmp_path / "f", {"w": {"x": np.float32(bad)}}, metadata={})
    write_sealed(tmp_path / "f", "fisher", {"metadata": {}}, {"w": np.float32(bad)})
    with pytest.raises(FileFormatError, match="`w` holds an entry"):
        checkpoint.load_fisher(tmp_path / "f")


def test_a_fisher_is_of_floats(tmp_path):
    with pytest.raises(StructureError, match="`w` is int64"):
        checkpoint.save_fisher(tmp_path / "f", {"w": np.arange(3)}, metadata={})


def test_files_of_one_kind_are_not_taken_for_another(tmp_path):
    checkpoint.save_fisher(tmp_path / "f", FISHER, metadata={})
    for load in (checkpoint.load_patch, checkpoint.load_mask):
        with pytest.raises(FileFormatError, match="is a fisher file; wanted"):
            load(tmp_path / "f")
    checkpoint.save_params(tmp_path / "m.safetensors", FISHER)
    for load in (checkpoint.load_patch, checkpoint.load_mask, checkpoint.load_fisher):
        with pytest.raises(FileFormatError, match="no whole-file digest"):
            load(tmp_path / "m.safetensors")


def test_any_flipped_bit_is_found(tmp_path):
    checkpoint.save_fisher(tmp_path / "f", {"w": np.ones(2, np.float32)}, metadata={})
    checkpoint.save_mask(tmp_path / "m", {"w": np.array([True, False])})
    for name, load in (("f", checkpoint.load_fisher), ("m", checkpoint.load_mask)):
        good = (tmp_path / name).read_bytes()
        for bit in range(0, 8 * len(good), 7):  # patch files are tried at every bit
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(FileFormatError):
                load(tmp_path / name)


MASKS = hnp.array_shapes(min_side=0, max_side=40, max_dims=3).flatmap(
    lambda shape: (
        hnp.arrays(bool, shape) | hnp.arrays(bool, shape, elements=st.just(False), fill=st.nothing())
    )
)


@given(st.dictionaries(st.sampled_from(["a", "b.c", "b.d"]), MASKS))
def test_a_mask_comes_back(tmp_path_factory, flat):
    path = tmp_path_factory.getbasetemp() / "mask"
    checkpoint.save_mask(path, tree.nest(flat), metadata={"density": 0.5})
    mask, metadata = checkpoint.load_mask(path)
    got = tree.flatten(mask)
    assert metadata == {"density": 0.5} and set(got) == set(flat)
    for name, want in flat.items():
        assert got[name].dtype == bool and got[name].shape == want.shape
        np.testing.assert_array_equal(got[name], want)


def test_a_sparse_mask_is_small(tmp_path):
    mask = {"w": jnp.asarray(np.random.default_rng(0).random((1000, 1000)) < 0.005)}
    checkpoint.save_mask(tmp_path / "m", mask)
    assert (tmp_path / "m").stat().st_size < 6500  # 0.0454 bits an entry is the entropy, 5.7 kB
    np.testing.assert_array_equal(checkpoint.load_mask(tmp_path / "m")[0]["w"], mask["w"])


def test_a_mask_is_of_bools(tmp_path):
    with pytest.raises(StructureError, match="`w` is float32"):
        checkpoint.save_mask(tmp_path / "m", {"w": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    "note, match",
    [
        ({"shape": [100]}, "`encoding`"),
        ({"shape": [-1], "encoding": "bits"}, "`shape`"),
        ({"shape": [99], "encoding": "bits"}, "bytes for 99 bits"),
        ({"shape": [13], "encoding": "bits"}, "beyond its 13 entries"),
        ({"shape": [16], "encoding": "zip"}, "'zip'"),
        ({"shape": [16], "encoding": "rice", "parameter": 0}, "`count`"),
        ({"shape": [16], "encoding": "rice", "parameter": 0, "count": 99}, "cannot hold|does not hold"),
        ({"shape": [3], "encoding": "rice", "parameter": 0, "count": 16}, "keeps entry 15 of 3"),
        ({"shape": [2**50], "encoding": "rice", "parameter": 0, "count": 16}, "at most"),
        (None, "`w`"),
    ],
)
def test_a_mask_that_lies(tmp_path, note, match):
    leaves = {"w": note} if note else {}
    stored = {"w": np.uint8([255, 255])}
    write_sealed(tmp_path / "m", "mask", {"leaves": leaves, "metadata": {}}, stored)
    with pytest.raises(FileFormatError, match=match):
        checkpoint.load_mask(tmp_path / "m")
    assert read_sealed(tmp_path / "m").manifest["format"] == "mask"  # the file itself is sound
