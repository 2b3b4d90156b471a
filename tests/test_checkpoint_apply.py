"""Patching models on disk: the same bits as in memory, or nothing at all."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fishjax import checkpoint, patches, tree
from fishjax.errors import FileFormatError, StructureError, UsageError, WrongBaseError

RNG = np.random.default_rng(0)
BASE = {
    "layer": {
        "kernel": RNG.normal(size=(6, 8)).astype(np.float32),
        "bias": RNG.normal(size=8).astype(np.float32),
    },
    "half": RNG.normal(size=(4, 4)).astype(ml_dtypes.bfloat16),
    "table": RNG.normal(size=(50, 40)).astype(np.float32),
    "rest": np.arange(3),
}
PATCH = {
    "layer.kernel": patches.Scale(
        jnp.asarray(RNG.normal(size=(1, 8)).astype(np.float32)), tied=(("layer.bias", (8,)),)
    ),
    "half": patches.Scale(jnp.asarray(RNG.normal(size=(4, 1)).astype(np.float32))),
    "table": patches.Sparse(
        np.sort(RNG.choice(2000, 20, replace=False)).astype(np.int32), RNG.normal(size=20).astype(np.float32)
    ),
}


@pytest.fixture(params=["file", "folder", "shards"])
def base(request, tmp_path):
    path = tmp_path / ("base.safetensors" if request.param == "file" else "base")
    checkpoint.save_params(path, BASE, shard_bytes=100 if request.param == "shards" else 1 << 30)
    if request.param != "file":
        (path / "config.json").write_text('{"a": 1}')
        (path / "sub").mkdir()
        (path / "sub" / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def patch_file(tmp_path):
    checkpoint.save_patch(tmp_path / "patch", PATCH, base=BASE)
    return tmp_path / "patch"


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_on_disk_as_in_memory(tmp_path, base, patch_file, out):
    want = patches.apply(
        tree.map_named(lambda _, x: jnp.asarray(x), {**BASE, "rest": np.int32([0, 1, 2])}), PATCH
    )
    done = checkpoint.apply_file(patch_file, base, tmp_path / out)
    got = checkpoint.load_params(tmp_path / out)
    assert done.digest == checkpoint.digest(got) == checkpoint.digest({**want, "rest": BASE["rest"]})
    assert (done.changed, done.leaves, done.left_out) == (4, 5, [])
    if base.is_dir() and out == "out":
        assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
        assert (tmp_path / "out" / "sub" / "tokenizer.json").exists()
        assert sorted(os.listdir(base)) == sorted(os.listdir(tmp_path / "out"))
    assert not list(tmp_path.glob(".*"))


def test_low_rank_against_float64(tmp_path):
    a, b = RNG.normal(size=(6, 1, 3)).astype(np.float32), RNG.normal(size=(1, 8, 3)).astype(np.float32)
    patch = {"layer.kernel": patches.LowRank(a, b, scale=0.5)}
    checkpoint.save_patch(tmp_path / "p", patch, base=BASE)
    checkpoint.save_params(tmp_path / "base", BASE)
    checkpoint.apply_file(tmp_path / "p", tmp_path / "base", tmp_path / "out")
    got = checkpoint.load_params(tmp_path / "out")["layer"]["kernel"]
    terms = [0.5 * a[..., i].astype(np.float64) * b[..., i] for i in range(3)]
    want = BASE["layer"]["kernel"] + sum(terms)
    bound = 8 * 2.0**-24 * (np.abs(BASE["layer"]["kernel"]) + sum(map(np.abs, terms)))
    assert (np.abs(got - want) <= bound).all() and np.abs(want - BASE["layer"]["kernel"]).max() > 0.1
    in_memory = patches.apply({"layer": {"kernel": jnp.asarray(BASE["layer"]["kernel"])}}, patch)
    assert (np.abs(got - in_memory["layer"]["kernel"]) <= bound).all()


@pytest.mark.parametrize("name", ["layer.kernel", "layer.bias", "half", "table"])
def test_one_bit_of_the_base_is_enough(tmp_path, patch_file, name):
    flat = {n: np.array(x) for n, x in tree.flatten(BASE).items()}
    flat[name].reshape(-1).view(np.uint8)[5] ^= 1
    checkpoint.save_params(tmp_path / "base", tree.nest(flat))
    before = sorted(os.listdir(tmp_path))
    for touched_only in (False, True):
        with pytest.raises(WrongBaseError, match=f"`{name}`"):
            checkpoint.apply_file(patch_file, tmp_path / "base", tmp_path / "out", touched_only=touched_only)
    assert sorted(os.listdir(tmp_path)) == before


def renamed(flat):
    flat["tables"] = flat.pop("table")


def cast(flat):
    flat["table"] = flat["table"].astype(np.float16)


def reshaped(flat):
    flat["table"] = flat["table"].T


def transposed(flat):
    flat["half"] = flat["half"].T


@pytest.mark.parametrize("change", [renamed, cast, reshaped, transposed])
def test_other_bases(tmp_path, patch_file, change):
    flat = dict(tree.flatten(BASE))
    change(flat)
    checkpoint.save_params(tmp_path / "base", tree.nest(flat))
    with pytest.raises(WrongBaseError, match=r"`table`|`half`"):
        checkpoint.apply_file(patch_file, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_differs_elsewhere(tmp_path, patch_file):
    other = {**BASE, "rest": np.arange(3) + 1}
    checkpoint.save_params(tmp_path / "base", other)
    with pytest.raises(WrongBaseError, match="content id"):
        checkpoint.apply_file(patch_file, tmp_path / "base", tmp_path / "out")
    done = checkpoint.apply_file(patch_file, tmp_path / "base", tmp_path / "out", touched_only=True)
    assert done.digest == checkpoint.digest(checkpoint.load_params(tmp_path / "out"))


def test_a_broken_promise(tmp_path, base, patch_file):
    from fishjax.checkpoint._manifest import read_sealed, write_sealed

    manifest, tensors, _ = read_sealed(patch_file)
    manifest["results"]["table"] = "sha256:" + "0" * 64
    said = {k: v for k, v in manifest.items() if k not in ("format", "version")}
    write_sealed(tmp_path / "lie", "patch", said, tensors)
    with pytest.raises(FileFormatError, match="another result for `table`"):
        checkpoint.apply_file(tmp_path / "lie", base, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("out", [".", "", ".."])
def test_out_must_be_a_name(tmp_path, patch_file, monkeypatch, out):
    (tmp_path / "empty" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "in")
    with pytest.raises(UsageError, match="names no new file or folder"):
        checkpoint.apply_file(patch_file, tmp_path / "b", out)


def test_out_is_never_overwritten(tmp_path, patch_file):
    checkpoint.save_params(tmp_path / "base", BASE)
    for out in (tmp_path / "base", tmp_path / "patch", tmp_path):
        with pytest.raises(UsageError, match="exists"):
            checkpoint.apply_file(patch_file, tmp_path / "base", out)
    (tmp_path / "empty").mkdir()
    checkpoint.apply_file(patch_file, tmp_path / "base", tmp_path / "empty")
    with pytest.raises(UsageError, match="an input"):
        checkpoint.diff_files(tmp_path / "base", tmp_path / "empty", tmp_path / "base")


def test_what_is_left_out_is_told(tmp_path, patch_file):
    base = tmp_path / "base"
    checkpoint.save_params(base, BASE)
    for name in ("pytorch_model.bin", "adapter.safetensors", "flax_model.msgpack"):
        (base / name).write_text("stale")
    (base / ".git").mkdir()
    (base / "card.md").symlink_to(tmp_path / "blob")  # broken
    (tmp_path / "real").write_text("text")
    (base / "README.md").symlink_to(tmp_path / "real")  # may be anything that this user can read
    (base / "notes.txt").write_text("text")
    (base / "again.txt").symlink_to("notes.txt")
    done = checkpoint.apply_file(patch_file, base, tmp_path / "out")
    assert done.left_out == [
        ".git",
        "README.md",
        "adapter.safetensors",
        "card.md",
        "flax_model.msgpack",
        "pytorch_model.bin",
    ]
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "again.txt").read_text() == "text"
    assert not (tmp_path / "out" / "again.txt").is_symlink()


def test_a_snapshot_of_the_hub_cache_is_a_base(tmp_path, patch_file):
    base, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (base / "sub").mkdir(parents=True)
    checkpoint.save_params(blobs, BASE)
    (blobs / "model.safetensors").rename(blobs / "1")
    (blobs / "2").write_text('{"a": 1}')
    (base / "model.safetensors").symlink_to("../../blobs/1")
    (base / "config.json").symlink_to("../../blobs/2")
    (base / "sub" / "tokenizer.json").symlink_to("../../../blobs/2")
    done = checkpoint.apply_file(patch_file, base, tmp_path / "out")
    assert done.left_out == [] and (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.json")) == ["config.json", "tokenizer.json"]


FLOATS = st.sampled_from(
    [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn, np.int32]
)


@given(st.data())
def test_diff_then_apply_gives_every_bit(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "diff"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dtype = np.dtype(data.draw(FLOATS))
    bits = data.draw(
        hnp.arrays(np.uint8, data.draw(hnp.array_shapes(min_side=0, max_side=20)) + (dtype.itemsize,))
    )
    base = np.ascontiguousarray(bits).view(dtype)[..., 0]
    with np.errstate(invalid="ignore"):  # signalling NaNs
        tuned = np.where(np.isfinite(base), base, np.zeros((), dtype))
    where = data.draw(hnp.arrays(bool, tuned.shape, elements=st.sampled_from([False] * 9 + [True])))
    tuned = np.where(where, -tuned, tuned)  # -0.0 too
    trees = {"w": base, "v": np.ones(3)}, {"w": tuned, "v": np.ones(3)}
    for name, params in zip(("base", "tuned"), trees):
        checkpoint.save_params(folder / name, params)
    found = checkpoint.diff_files(folder / "base", folder / "tuned", folder / "p")
    done = checkpoint.apply_file(folder / "p", folder / "base", folder / "out")
    assert done.digest == checkpoint.digest(trees[1])
    raw = [np.ascontiguousarray(t["w"]).reshape(-1, 1).view(np.uint8) for t in trees]
    assert found.changed == (raw[0] != raw[1]).any(-1).sum() and found.entries == base.size + 3


def test_diff_picks_the_smaller(tmp_path):
    base = {"few": np.zeros(1000, np.float32), "most": np.zeros(1000, np.float32), "none": np.ones(4)}
    tuned = {**base, "few": base["few"].copy(), "most": base["most"] + 1}
    tuned["few"][[3, 700]] = 1
    for name, params in (("base", base), ("tuned", tuned)):
        checkpoint.save_params(tmp_path / name, params)
    checkpoint.diff_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "p", metadata={"author": "ada"})
    file = checkpoint.read_patch(tmp_path / "p")
    assert {n: c.kind for n, c in file.changes.items()} == {"few": "sparse", "most": "dense"}
    assert file.changes["few"].arrays["indices"].tolist() == [3, 700] and file.metadata == {"author": "ada"}
    as_loaded = patches.apply(
        tree.map_named(lambda _, x: jnp.asarray(x, jnp.float32), base),
        checkpoint.load_patch(tmp_path / "p")[0],
    )
    np.testing.assert_array_equal(as_loaded["few"], tuned["few"])


def test_diff_of_models_that_do_not_fit(tmp_path):
    checkpoint.save_params(tmp_path / "base", BASE)
    for change in (renamed, cast, reshaped):
        flat = dict(tree.flatten(BASE))
        change(flat)
        checkpoint.save_params(tmp_path / "tuned", tree.nest(flat))
        with pytest.raises(StructureError, match="`table`"):
            checkpoint.diff_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "p")
    checkpoint.save_params(tmp_path / "tuned", {**BASE, "half": BASE["half"] * ml_dtypes.bfloat16("nan")})
    with pytest.raises(StructureError, match="`half::values` holds NaN"):
        checkpoint.diff_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "p")
    assert not (tmp_path / "p").exists()


PEAK = (
    "import json, re, sys; from pathlib import Path; from fishjax import checkpoint as c\n"
    # Not `ru_maxrss`: a child starts with its parent's.
    "status = lambda: Path('/proc/self/status').read_text()\n"
    "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) / 1024\n"
    "start = peak()\n"
)


def run(script, folder):
    """Return what a script prints that runs in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A model of 160 MB in tensors of 8 MB: comparing and patching take a few tensors each."""
    tensors = {f"t{i:02d}": np.full((5, 400_000), i, np.float32) for i in range(20)}
    checkpoint.save_params(tmp_path / "base.safetensors", tensors)
    for i, x in enumerate(tensors.values()):
        x[0, i] = -1
        if i % 2:  # ten tensors are stored whole
            x[:] = 7
    checkpoint.save_params(tmp_path / "tuned.safetensors", tensors)
    script = (
        "c.diff_files('base.safetensors', 'tuned.safetensors', 'p'); diff = peak()\n"
        "c.apply_file('p', 'base.safetensors', 'out.safetensors')\n"
        "print(json.dumps([start, diff, peak(), 'jax' in sys.modules]))"
    )
    start, diff, both, jax_was_imported = run(script, tmp_path)
    print(f"peak MB: start {start:.0f}, diff {diff:.0f}, apply {both:.0f}")
    assert diff - start < 40 and both - start < 48 and not jax_was_imported
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()


def test_no_more_than_one_tensors_indices_are_held(tmp_path):
    """A patch of 53 MB of indices, decoded, of tensors of 4 MB."""
    tensors = {f"t{i:02d}": np.full((5, 200_000), i, np.float32) for i in range(40)}
    checkpoint.save_params(tmp_path / "base.safetensors", tensors)
    for x in tensors.values():
        x[:, ::3] = -1
    checkpoint.save_params(tmp_path / "tuned.safetensors", tensors)
    checkpoint.diff_files(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "p")
    changes = checkpoint.read_patch(tmp_path / "p").changes
    assert sum(c.arrays["indices"].nbytes for c in changes.values()) > 53e6
    script = "c.apply_file('p', 'base.safetensors', 'out.safetensors'); print(json.dumps([start, peak()]))"
    start, peak = run(script, tmp_path)
    print(f"peak MB: start {start:.0f}, apply {peak:.0f}")
    assert peak - start < 40
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()
