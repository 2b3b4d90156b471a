"""Shorter patches tell what they lose; precision travels along and merging uses it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fishjax import checkpoint, merge, patches
from fishjax.errors import FileFormatError, StructureError, UsageError

RNG = np.random.default_rng(0)
BASE = {
    "w": RNG.normal(size=(40, 50)).astype(np.float32),
    "half": RNG.normal(size=(30, 10)).astype(ml_dtypes.bfloat16),
    "head": RNG.normal(size=(5, 30)).astype(np.float32),
}
WHERE = np.sort(RNG.choice(2000, 200, replace=False)).astype(np.int32)


def patch():
    moved = lambda x: x + (0.01 * RNG.normal(size=x.shape)).astype(np.float32)
    half = np.arange(0, 300, 3, dtype=np.int32)
    return {
        "w": patches.Sparse(WHERE, moved(BASE["w"].reshape(-1)[WHERE])),
        "half": patches.Sparse(half, moved(BASE["half"].reshape(-1)[half].astype(np.float32))),
        "head": patches.Dense(moved(BASE["head"])),
    }


@pytest.mark.parametrize("mode", ["bf16", "int8"])
def test_lossy_files_state_their_error_and_promise_their_own_result(tmp_path, mode):
    exact = patch()
    sizes = {}
    for name, lossy in (("exact", None), ("short", mode)):
        checkpoint.save_patch(tmp_path / name, exact, base=BASE, lossy=lossy)
        sizes[name] = sum(t["bytes"] for t in checkpoint.inspect(tmp_path / name)["tensors"])
    checkpoint.save_params(tmp_path / "base", BASE)
    checkpoint.apply_file(
        tmp_path / "short", tmp_path / "base", tmp_path / "out"
    )  # holds the result's digests
    got, want = checkpoint.load_params(tmp_path / "out"), patches.apply(BASE, exact)
    checkpoint.save_params(tmp_path / "tuned", want)
    checkpoint.diff_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff", lossy=mode)
    checkpoint.apply_file(tmp_path / "diff", tmp_path / "base", tmp_path / "again")
    again, told = checkpoint.load_params(tmp_path / "again"), checkpoint.inspect(tmp_path / "diff")["lossy"]
    for name, x in want.items():
        error = np.abs(np.asarray(again[name], np.float64) - np.asarray(x, np.float64)).max()
        assert error == told["leaves"].get(name, {"max_error": 0.0})["max_error"]
    loaded = patches.apply(BASE, checkpoint.load_patch(tmp_path / "short")[0])
    told = checkpoint.inspect(tmp_path / "short")["lossy"]
    assert told["mode"] == mode and "lossy" not in checkpoint.inspect(tmp_path / "exact")
    assert set(told["leaves"]) == ({"w", "head"} if mode == "bf16" else {"w", "head", "half"})
    for name, x in want.items():
        np.testing.assert_array_equal(loaded[name], got[name])  # on a device too, to the bit
        error = np.abs(np.asarray(got[name], np.float64) - np.asarray(x, np.float64))
        said = told["leaves"].get(name, {"max_error": 0.0, "rms_change": 1.0, "rms_error": 0.0})
        assert error.max() == said["max_error"]
        bound = (
            2.0**-8 * np.abs(np.asarray(x, np.float64))
            if mode == "bf16"
            else 0.04 / 127 + 2.0**-8 * 4 * (name == "half")
        )
        assert (error <= bound).all()
    assert (
        0
        < told["leaves"]["w"]["rms_error"]
        < (0.5 if mode == "bf16" else 0.02) * told["leaves"]["w"]["rms_change"]
    )
    assert sizes["short"] < (0.7 if mode == "bf16" else 0.55) * sizes["exact"]


def test_an_unknown_mode_and_a_lie_about_scales(tmp_path):
    with pytest.raises(UsageError, match="`lossy` must be one of 'bf16', 'int8'"):
        checkpoint.save_patch(tmp_path / "p", patch(), base=BASE, lossy="int4")
    odd = {
        "three": patches.Delta(np.ones(2, np.int8), np.float32([3.0]), np.array([0, 1])),
        "few": patches.Delta(np.ones(65, np.int8), np.float32([1.0]), np.arange(65)),
        "short": patches.Delta(np.ones(2, np.int8), np.float32([1.0])),
        "wide": patches.Delta(np.ones(2, np.int16), np.float32([1.0]), np.array([0, 1])),
    }
    for kind in odd.values():
        with pytest.raises(StructureError, match="`w`"):
            checkpoint.save_patch(tmp_path / "p", {"w": kind}, base=BASE)


@pytest.mark.parametrize("whole", [True, False])
def test_precision_travels_and_merges(tmp_path, whole):
    made = patch()
    fisher = {n: RNG.random(x.shape).astype(np.float32) for n, x in BASE.items()}
    given = fisher if whole else {"w": fisher["w"].reshape(-1)[WHERE], "head": fisher["head"]}
    checkpoint.save_patch(tmp_path / "p", made, base=BASE, precision=given)
    loaded, precision = checkpoint.load_patch(tmp_path / "p")[0], checkpoint.load_precision(tmp_path / "p")
    assert set(precision) == set(given)
    np.testing.assert_array_equal(precision["w"], fisher["w"].reshape(-1)[WHERE])
    np.testing.assert_array_equal(precision["head"], fisher["head"])
    assert checkpoint.inspect(tmp_path / "p")["precision"] == sorted(given)
    some = {n: loaded[n] for n in precision}
    known = merge.information(BASE, some, precision)
    for name, evidence in merge.information(BASE, some, fisher).items():
        np.testing.assert_array_equal(known[name].shift, evidence.shift)
    # Two contributions that agree on where, and a wrong one that is taken out again.
    other = merge.information(
        BASE, {"w": patches.Sparse(WHERE, 0 * loaded["w"].values)}, {"w": precision["w"]}
    )
    resolved = merge.resolve(BASE, merge.subtract(merge.add(known, other), other))
    np.testing.assert_allclose(resolved["w"].values, loaded["w"].values, rtol=1e-6)


@pytest.mark.parametrize(
    ("precision", "match"),
    [
        ({"w": np.ones(3, np.float32)}, "shape"),
        ({"w": -np.ones(200, np.float32)}, ">= 0"),
        ({"w": np.full(200, np.nan, np.float32)}, ">= 0"),
        ({"w": np.ones(200, np.int32)}, "wanted a float"),
        ({"other": np.ones(3, np.float32)}, "none of the leaves"),
    ],
)
def test_precisions_that_do_not_fit(tmp_path, precision, match):
    with pytest.raises(StructureError, match=match):
        checkpoint.save_patch(tmp_path / "p", patch(), base=BASE, precision=precision)
    scaled = {"w": patches.Scale(jnp.ones((1, 50)))}
    with pytest.raises(StructureError, match="no diagonal precision"):
        checkpoint.save_patch(
            tmp_path / "p", scaled, base=BASE, precision={"w": np.ones((40, 50), np.float32)}
        )
    assert not list(tmp_path.iterdir())


def test_a_file_whose_precision_lies_is_refused(tmp_path):
    from fishjax.checkpoint._manifest import read_sealed, write_sealed

    checkpoint.save_patch(tmp_path / "p", patch(), base=BASE)
    manifest, tensors, _ = read_sealed(tmp_path / "p")
    said = {k: v for k, v in manifest.items() if k not in ("format", "version")}
    for bad in (np.ones(199, np.float32), -np.ones(200, np.float32)):
        write_sealed(tmp_path / "lie", "patch", said, {**tensors, "w::precision": bad})
        with pytest.raises(FileFormatError, match="precision of `w`"):
            checkpoint.load_patch(tmp_path / "lie")
