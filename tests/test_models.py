"""Loading models: precisions, shardings, the hub's cache, initial parameters; and convert, there and back."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fishjax import checkpoint, cli, models, tree
from tests.model_folders import FIXTURES, load

pytestmark = pytest.mark.usefixtures("quick")


def test_dtype_casts_and_stays():
    model, params = models.load(FIXTURES / "qwen3", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    expected = load_file(FIXTURES / "qwen3" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask")}
    logits = model.apply(params, batch)
    assert logits.dtype == jnp.bfloat16
    mask = batch["attention_mask"] > 0
    error = np.abs(np.asarray(logits, np.float32) - expected["logits"])[mask]
    assert 1e-4 < error.max() < 0.1 * np.abs(expected["logits"]).max()


def test_float64_stays_float64(x64):
    model, params = models.load(FIXTURES / "t5_v1_1", dtype=jnp.float64)
    expected = load_file(FIXTURES / "t5_v1_1" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "labels")}
    logits = jax.jit(model.apply)(params, batch)
    assert logits.dtype == jnp.float64
    keep = batch["labels"] >= 0
    np.testing.assert_allclose(logits[keep], expected["logits"][keep], atol=1e-4)


def test_init_has_the_names_and_shapes_of_the_file():
    for case in ("t5_v1_1", "roberta_classifier", "bloom", "gemma2", "gpt2"):
        model, params, _ = load(case)
        fresh = jax.eval_shape(model.init, jax.random.key(0))
        tree.check_same(fresh, params, (case, "file"))
    fresh = model.init(jax.random.key(0))["transformer"]["h"]["0"]
    assert (
        float(fresh["ln_1"]["weight"].min()) == 1
        and 0.01 < float(fresh["mlp"]["c_fc"]["weight"].std()) < 0.03
    )


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "t5_v1_1", tmp_path / "m")
    return tmp_path / "m"


def test_convert_goes_there_and_back(tmp_path, capsys):
    base, adapter = str(FIXTURES / "llama3"), FIXTURES / "llama3" / "adapters" / "ia3"
    out = lambda name: str(tmp_path / name)
    assert cli.main(["convert", base, out("orbax"), "--to", "orbax"]) == 0
    assert cli.main(["convert", out("orbax"), out("hf"), "--to", "hf"]) == 0
    assert checkpoint.digest(checkpoint.load_params(out("hf"))) == checkpoint.digest(
        checkpoint.load_params(base)
    )
    assert (
        models.load(out("hf"))[0].config == models.load(out("orbax"))[0].config == models.load(base)[0].config
    )
    assert cli.main(["convert", base, out("half"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    assert {x.dtype.name for x in tree.flatten(checkpoint.load_params(out("half"))).values()} == {"bfloat16"}
    said = [json.loads(pathlib.Path(p, "config.json").read_text()) for p in (base, out("half"))]
    assert said[1] == said[0] | {"dtype": "bfloat16"} != said[0]
    assert cli.main(["convert", str(adapter), out("p"), "--to", "patch", "--model", base]) == 0
    assert cli.main(["convert", out("p"), out("a"), "--to", "peft", "--model", base]) == 0
    theirs, ours = (load_file(f"{p}/adapter_model.safetensors") for p in (adapter, out("a")))
    assert theirs.keys() == ours.keys() and all((theirs[n] == ours[n]).all() for n in ours)
    assert cli.main(["convert", out("p"), out("b"), "--to", "peft", "--model", str(FIXTURES / "llama")]) == 4
    assert cli.main(["convert", base, out("hf"), "--to", "hf"]) == 2
    assert cli.main(["convert", base, out("c"), "--to", "peft"]) == 2
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_tensors_go_straight_to_where_they_are_wanted(layout, tmp_path):
    checkpoint.save_params(tmp_path / "m", checkpoint.load_params(FIXTURES / "bloom"), layout=layout)
    shutil.copy(FIXTURES / "bloom" / "config.json", tmp_path / "m")
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    _, params = models.load(tmp_path / "m", shardings={name: split})
    flat, (_, plain) = tree.flatten(params), models.load(FIXTURES / "bloom")
    assert flat[name].sharding == split and len(flat[name].addressable_shards) == 8
    assert sum(len(x.sharding.device_set) == 8 for x in flat.values()) == 1
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    _, half = models.load(tmp_path / "m", shardings={name: split}, dtype=jnp.bfloat16)
    assert tree.flatten(half)[name].sharding == split
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda h, x: np.testing.assert_array_equal(h, x.astype(jnp.bfloat16)), half, plain)
    odd = "transformer.word_embeddings.weight"  # 67 rows do not go on 8 devices
    with pytest.raises(ValueError, match="8"):
        models.load(tmp_path / "m", shardings={odd: split})


@pytest.mark.parametrize("kind", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_weights_in_fp8_load_exactly_and_round_trip(kind, layout, tmp_path):
    fp8 = jax.tree.map(lambda x: x.astype(kind), checkpoint.load_params(FIXTURES / "llama"))
    checkpoint.save_params(tmp_path / "m", fp8, layout=layout)
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path / "m")
    model, narrow = models.load(tmp_path / "m")
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(kind)}
    _, wide = models.load(tmp_path / "m", dtype=jnp.float32)
    exact = jax.tree.map(lambda x: x.astype(np.float64), fp8)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.float64, wide), exact)
    logits = model.apply(wide, {"input_ids": jnp.array([[5, 9, 11]])})
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    wider = ["convert", str(tmp_path / "m"), str(tmp_path / "wide"), "--to", "hf", "--dtype", "float32"]
    assert cli.main(wider) == 0
    assert checkpoint.digest(checkpoint.load_params(tmp_path / "wide")) == checkpoint.digest(wide)
    checkpoint.save_params(tmp_path / "again", narrow, layout=layout)
    assert checkpoint.digest(checkpoint.load_params(tmp_path / "again")) == checkpoint.digest(fp8)


def test_donating_loaded_parameters_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    _, params = models.load(folder)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    assert (folder / "model.safetensors").read_bytes() == before
    _, again = models.load(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, again)


def test_links_of_the_hub_cache_are_taken(folder, tmp_path, capsys):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    folder = folder.rename(tmp_path / "snapshots" / "abc")
    for i, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(tmp_path / "blobs" / str(i))
        (folder / name).symlink_to(pathlib.Path("../../blobs") / str(i))
    assert models.load(folder)[0].family == "t5"
    (tmp_path / "card").write_text("private")
    (folder / "README.md").symlink_to(tmp_path / "card")
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "left out `README.md`" in capsys.readouterr().err
    models.load(tmp_path / "out")
