"""Parameters from files, Hugging Face folders and Orbax folders, and what is wrong with some of them."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fishjax import checkpoint
from fishjax.errors import FileFormatError, StructureError, UsageError

TREE = {
    "encoder": {
        "0": {"weight": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.zeros(4, np.float16)}
    },
    "head": np.arange(5).astype(ml_dtypes.bfloat16),
    "step": np.int32(3),
    "empty": np.zeros((0, 3), np.float32),
}


def same(a, b):
    assert checkpoint.digest(a) == checkpoint.digest(b)


@pytest.mark.parametrize("name, options", [("a.safetensors", {}), ("a", {}), ("a", {"shard_bytes": 20})])
def test_round_trip(tmp_path, name, options):
    checkpoint.save_params(tmp_path / name, TREE, **options)
    got = checkpoint.load_params(tmp_path / name)
    same(got, TREE)
    assert list(got["encoder"]) == ["0"]
    assert not got["encoder"]["0"]["weight"].flags.writeable


FULL = {k: v for k, v in TREE.items() if k != "empty"}  # tensorstore holds no zero-size arrays
FP8 = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
LAYOUTS = [("a.safetensors", {}), ("a", {}), ("a", {"shard_bytes": 20}), ("a", {"layout": "orbax"})]


def test_round_trip_through_orbax(tmp_path):
    checkpoint.save_params(tmp_path / "a", FULL, layout="orbax")
    same(checkpoint.load_params(tmp_path / "a"), FULL)
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.save_params(tmp_path / "a", FULL, layout="orbax")
    with pytest.raises(StructureError, match="`empty` has no entries"):
        checkpoint.save_params(tmp_path / "b", TREE, layout="orbax")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name, options", LAYOUTS)
def test_every_fp8_number_keeps_its_bits(tmp_path, name, options):
    every = {kind.__name__: np.arange(256, dtype=np.uint8).view(kind) for kind in FP8}  # NaNs too
    checkpoint.save_params(tmp_path / name, every, **options)
    got = checkpoint.load_params(tmp_path / name)
    for kind, x in every.items():
        assert got[kind].dtype == x.dtype and got[kind].tobytes() == x.tobytes()


@pytest.mark.parametrize("name, options", LAYOUTS)
def test_just_the_leaves_that_are_asked_for(tmp_path, name, options):
    checkpoint.save_params(tmp_path / name, FULL, **options)
    bias, head = FULL["encoder"]["0"]["bias"], FULL["head"]
    same(checkpoint.load_params(tmp_path / name, only="bias$"), {"encoder": {"0": {"bias": bias}}})
    same(
        checkpoint.load_params(tmp_path / name, only=["^head$", "bias"]),
        {"encoder": {"0": {"bias": bias}}, "head": head},
    )
    with pytest.raises(UsageError, match=r"`biass` matches no leaf; near names: .*`encoder\.0\.bias`"):
        checkpoint.load_params(tmp_path / name, only=["head", "biass"])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts what a process reads as Linux does")
def test_a_part_of_an_orbax_folder_costs_a_part_of_the_reading(tmp_path):
    big = np.random.default_rng(0).normal(size=1 << 20)  # 8 MiB that do not compress
    checkpoint.save_params(tmp_path / "a", {"big": big, "small": np.ones(9)}, layout="orbax")

    def bytes_read(only):
        count = lambda: int(Path("/proc/self/io").read_text().split()[1])
        before = count()
        checkpoint.load_params(tmp_path / "a", only=only)
        return count() - before

    assert bytes_read(None) > big.nbytes * 0.9
    assert bytes_read("small") < big.nbytes / 10


def test_saving_to_orbax_in_the_background(tmp_path):
    w = np.arange(1 << 16, dtype=np.float32)
    wait = checkpoint.save_params(tmp_path / "a", {"w": w}, layout="orbax", wait=False)
    w[:] = -1  # what is written is what was given
    assert wait() is None and wait() is None
    same(checkpoint.load_params(tmp_path / "a"), {"w": np.arange(1 << 16, dtype=np.float32)})
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.save_params(tmp_path / "a", {"w": w}, layout="orbax", wait=False)
    with pytest.raises(UsageError, match="`wait=False`"):
        checkpoint.save_params(tmp_path / "b", {"w": w}, wait=False)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_to_orbax_that_fails_says_so_and_leaves_nothing(tmp_path, wait):
    big = {"w": np.random.default_rng(0).normal(size=1 << 17)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_params(tmp_path / "a", big, layout="orbax", wait=wait)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_program_that_does_not_wait_for_its_save_is_told_what_became_of_it(tmp_path):
    code = """
import numpy as np
from fishjax import checkpoint
checkpoint.save_params("a", {"w": np.ones(1 << 22)}, layout="orbax", wait=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, timeout=60, capture_output=True, text=True
    )
    assert os.listdir(tmp_path) == ["a"] or ("Error" in done.stderr and os.listdir(tmp_path) == [])


def test_a_save_to_orbax_that_is_interrupted_looks_like_nothing(tmp_path):
    code = """
import os, sys, time
import numpy as np
from fishjax import checkpoint
checkpoint.save_params("a", {"w": np.random.default_rng(0).normal(size=1 << 23)}, layout="orbax", wait=False)
while not any("tmp" in name for name in os.listdir(".")):
    time.sleep(0.001)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert done.returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left != "a"
    with pytest.raises((FileFormatError, FileNotFoundError)):
        checkpoint.load_params(tmp_path / left)
    checkpoint.save_params(tmp_path / "b", FULL, layout="orbax")
    (tmp_path / "b").rename(tmp_path / "b.orbax-checkpoint-tmp")  # killed just before it was named
    with pytest.raises(FileFormatError, match="interrupted"):
        checkpoint.load_params(tmp_path / "b.orbax-checkpoint-tmp")


def test_jax_arrays_sharded_ones_and_double_precision(tmp_path):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("d")))
    tree = {"a": sharded, "b": jnp.ones(2, jnp.bfloat16), "c": np.float64(1) / 3}
    checkpoint.save_params(tmp_path / "a.safetensors", tree)
    got = checkpoint.load_params(tmp_path / "a.safetensors")
    same(got, tree)
    assert got["c"] == np.float64(1) / 3 and got["c"].dtype == np.float64


def test_a_folder_may_be_written_again(tmp_path):
    checkpoint.save_params(tmp_path / "a", TREE)
    (tmp_path / "a" / "config.json").write_text("{}")
    checkpoint.save_params(tmp_path / "a", {"w": np.ones(3)})
    same(checkpoint.load_params(tmp_path / "a"), {"w": np.ones(3)})
    with pytest.raises(UsageError, match=r"another layout \(`model.safetensors`\)"):
        checkpoint.save_params(tmp_path / "a", TREE, shard_bytes=20)


def test_from_one_file_to_another_without_loading(tmp_path):
    checkpoint.save_params(tmp_path / "a", TREE, shard_bytes=20)
    with checkpoint.open_params(tmp_path / "a") as tensors:
        checkpoint.save_params(tmp_path / "b.safetensors", tensors)
        assert tensors.specs["head"].shape == (5,) and len(tensors) == 5
        assert tensors.read_flat("encoder.0.weight", 2, 4).tolist() == [2, 3]
    same(checkpoint.load_params(tmp_path / "b.safetensors"), TREE)


def sharded(tmp_path):
    checkpoint.save_params(tmp_path / "a", TREE, shard_bytes=20)
    index = tmp_path / "a" / "model.safetensors.index.json"
    return tmp_path / "a", index, json.loads(index.read_text())


def test_a_missing_shard(tmp_path):
    folder, _, _ = sharded(tmp_path)
    os.unlink(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors` is missing"):
        checkpoint.load_params(folder)


def test_an_extra_shard(tmp_path):
    folder, _, _ = sharded(tmp_path)
    checkpoint.save_params(folder / "model-00009-of-00009.safetensors", {"x": np.ones(1)})
    with pytest.raises(FileFormatError, match=r"00009.safetensors` is not listed"):
        checkpoint.load_params(folder)


def lie_swapped(homes):
    homes["head"], homes["encoder.0.weight"] = homes["encoder.0.weight"], homes["head"]


def lie_missing(homes):
    del homes["step"]


def lie_extra(homes):
    homes["ghost"] = homes["step"]


@pytest.mark.parametrize(
    "lie, name", [(lie_swapped, "head|weight"), (lie_missing, "step"), (lie_extra, "ghost")]
)
def test_an_index_that_lies(tmp_path, lie, name):
    folder, index, told = sharded(tmp_path)
    lie(told["weight_map"])
    index.write_text(json.dumps(told))
    with pytest.raises(FileFormatError, match=name):
        checkpoint.load_params(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_files_behind_links_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "a"
    checkpoint.save_params(folder, TREE, shard_bytes=1 << 30 if name == "model.safetensors" else 20)
    for target, broken in ((tmp_path / "elsewhere", False), (tmp_path / "nothing", True)):
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(target)
        for read in (checkpoint.load_params, checkpoint.open_params, checkpoint.inspect):
            with pytest.raises(FileFormatError, match=f"{name}` is a symbolic link"):
                read(folder)
        if not broken:
            (folder / name).unlink()
            (tmp_path / "elsewhere").rename(folder / name)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "weights")
    (folder / name).symlink_to("weights")
    same(checkpoint.load_params(folder), TREE)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # in a circle
    with pytest.raises(OSError):
        checkpoint.load_params(folder)


def test_inspect_names_the_family_that_the_configuration_does(tmp_path):
    checkpoint.save_params(tmp_path, TREE)
    assert "family" not in checkpoint.inspect(tmp_path)
    for text, family in (('{"model_type": "mamba"}', "mamba"), ("{}", None), ('{"model_type": [1]}', None)):
        (tmp_path / "config.json").write_text(text)
        assert checkpoint.inspect(tmp_path).get("family") == family
        assert "family" not in checkpoint.inspect(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"config\.json` is not JSON"):
        checkpoint.inspect(tmp_path)


@pytest.mark.parametrize("home", ["../x.safetensors", "/etc/passwd", "model.bin", "", "sub/x.safetensors"])
def test_an_index_that_leads_elsewhere(tmp_path, home):
    folder, index, told = sharded(tmp_path)
    told["weight_map"]["step"] = home
    index.write_text(json.dumps(told))
    with pytest.raises(FileFormatError, match="`step` in"):
        checkpoint.load_params(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"weight_map":{}}',
        '{"weight_map":{"a":1}}',
        '{"weight_map":{"a":"b","a":"c"}}',
        "[" * 99999,
    ],
)
def test_an_index_that_is_none(tmp_path, text):
    folder, index, _ = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(FileFormatError, match="no index of shards"):
        checkpoint.load_params(folder)


def test_a_shard_of_another_model_and_two_layouts(tmp_path):
    folder, _, _ = sharded(tmp_path)
    checkpoint.save_params(folder / "model-00001-of-00003.safetensors", {"other": np.ones(1)})
    with pytest.raises(FileFormatError, match="does not hold it"):
        checkpoint.load_params(folder)
    checkpoint.save_params(folder / "model.safetensors", TREE)
    with pytest.raises(FileFormatError, match="both"):
        checkpoint.load_params(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "flax_model.msgpack", "m.pkl", "m.gguf", "m.npz"]
)
def test_formats_that_can_run_code(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04x")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(FileFormatError, match=f"{name}.*Convert it"):
            checkpoint.load_params(path)


def test_nothing_there(tmp_path):
    for path in (tmp_path / "no", tmp_path / "no.safetensors", tmp_path / "no.bin"):
        with pytest.raises(FileNotFoundError):
            checkpoint.load_params(path)
    (tmp_path / "README.md").write_text("hi")
    with pytest.raises(FileNotFoundError, match=r"found README.md"):
        checkpoint.load_params(tmp_path)


def test_a_leaf_that_is_a_branch(tmp_path):
    from fishjax.checkpoint._dtypes import Spec
    from fishjax.checkpoint._safetensors import write_file

    spec = Spec(np.dtype(np.float32), (1,))
    write_file(tmp_path / "a.safetensors", {"a": spec, "a.b": spec}, lambda _: np.ones(1, np.float32))
    with pytest.raises(StructureError, match=r"a leaf and a branch|below a leaf"):
        checkpoint.load_params(tmp_path / "a.safetensors")


def test_bad_layout_and_bad_leaves(tmp_path):
    with pytest.raises(UsageError, match="`layout`"):
        checkpoint.save_params(tmp_path / "a", TREE, layout="torch")
    with pytest.raises(StructureError, match="`x`"):
        checkpoint.save_params(tmp_path / "a.safetensors", {"x": jax.random.key(0)})
    assert os.listdir(tmp_path) == []


def test_orbax_folders_with_links_or_damage(tmp_path):
    checkpoint.save_params(tmp_path / "a", {"w": np.ones(3)}, layout="orbax")
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    with pytest.raises(FileFormatError, match="symbolic link"):
        checkpoint.load_params(tmp_path / "a")
    os.unlink(tmp_path / "a" / "link")
    (tmp_path / "a" / "_METADATA").write_text("{")
    with pytest.raises(FileFormatError, match="Orbax"):
        checkpoint.load_params(tmp_path / "a")
