"""Parameters from files, Hugging Face folders and Orbax folders, and what is wrong with some of them."""

import json
import os

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


def test_round_trip_through_orbax(tmp_path):
    tree = {k: v for k, v in TREE.items() if k != "empty"}  # tensorstore holds no zero-size arrays
    checkpoint.save_params(tmp_path / "a", tree, layout="orbax")
    same(checkpoint.load_params(tmp_path / "a"), tree)
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.save_params(tmp_path / "a", tree, layout="orbax")


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
