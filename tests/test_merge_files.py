"""Merging files: the same bits as in memory, whatever the cut; and what a folder gets beside them."""

import functools
import inspect
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, errors, merge
from fishjax.merge import _output
from fishjax.merge._statistics import GRAIN
from tests import merge_world
from tests.merge_world import params as _params

OPTIONS = {
    "average": {"weights": [1.0, 2.5]},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "dare": {"density": 0.5, "rescale": "l1"},
    "fisher": {"normalize": True, "favor": 1},
    "gradient_matching": {"weights": [0.3, 1.7]},
    "model_stock": {},
    "nuslerp": {"t": 0.3},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weights": [0.3, -1.0]},
    "ties": {"density": 0.3},
    "wise_ft": {"alpha": 0.3},
}


@pytest.fixture
def world(tmp_path):
    return functools.partial(merge_world.make, tmp_path)


def _arguments(method, given):
    known = inspect.signature(getattr(merge, method)).parameters
    models = given["models"][:1] if method == "wise_ft" else given["models"]
    return models, {k: v for k, v in given.items() if k in known and k != "models"} | OPTIONS[method]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64], ids=str)
@pytest.mark.parametrize("method", merge.METHODS)
def test_streamed_equals_in_memory_bit_by_bit(method, dtype, world, tmp_path):
    trees, paths = world(dtype)
    models, options = _arguments(method, trees)
    want = getattr(merge, method)(models, **options)
    models, options = _arguments(method, paths)
    out = tmp_path / "out.safetensors"
    digest = merge.files(method, models, out, block=GRAIN, **options)
    got = checkpoint.load_params(out)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), got) == jax.tree.map(lambda x: (x.dtype, x.shape), want)
    assert digest == checkpoint.digest(want)
    assert not (tmp_path / "out.safetensors.partial").exists()


@pytest.mark.parametrize("method", merge.METHODS)
def test_the_cut_does_not_matter(method, world, tmp_path):
    _, paths = world()
    models, options = _arguments(method, paths)
    cuts = [(1, 1), (GRAIN, 2), (2 * GRAIN, 3), (1 << 24, 1)]
    digests = {
        merge.files(
            getattr(merge, method), models, tmp_path / f"{i}.safetensors", block=b, threads=t, **options
        )
        for i, (b, t) in enumerate(cuts)
    }
    assert len(digests) == 1
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(len(cuts))}) == 1


def test_a_folder_gets_card_recipe_and_configuration(world, tmp_path):
    trees, _ = world()
    for name, params in (("one", trees["models"][0]), ("two", trees["models"][1])):
        checkpoint.save_params(tmp_path / name, params)
        (tmp_path / name / "config.json").write_text('{"model_type": "x"}')
    digest = merge.files(
        "average", [tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=[1, 3], keep=[("bias$", 1)]
    )
    want = merge.average(trees["models"], weights=[1, 3], keep=[("bias$", 1)])
    got = checkpoint.load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "fishjax_merge.yaml",
        "model.safetensors",
    ]
    card, recipe = ((tmp_path / "out" / n).read_text() for n in ("README.md", "fishjax_merge.yaml"))
    assert "base_model_relation: merge" in card and "- one\n- two" in card and digest in card
    for params in trees["models"]:
        assert checkpoint.digest(params) in recipe
    assert "weights:" in recipe and "bias$" in recipe


def test_shards_and_fishers(world, tmp_path, monkeypatch):
    _, paths = world()
    options = {"fishers": paths["fishers"]}
    want = merge.files("fisher", paths["models"], tmp_path / "one", **options)
    monkeypatch.setitem(_output.Output.__init__.__kwdefaults__, "shard_bytes", 1000)
    for i, models in enumerate([paths["models"], [tmp_path / "shards0", paths["models"][1]]]):
        got = merge.files("fisher", models, tmp_path / f"shards{i}", **options)
        assert len(list((tmp_path / f"shards{i}").glob("model-*-of-*.safetensors"))) > 1
        assert (tmp_path / f"shards{i}" / "model.safetensors.index.json").exists()
        assert got == checkpoint.digest(checkpoint.load_params(tmp_path / f"shards{i}"))
        again = [tmp_path / "one", paths["models"][1]]
        assert got == want
        want = merge.files("fisher", again, tmp_path / "again.safetensors", **options) if i == 0 else want
    card, recipe = ((tmp_path / "one" / n).read_text() for n in ("README.md", "fishjax_merge.yaml"))
    for i in (3, 4):  # Fishers are inputs, and no models
        assert checkpoint.digest(jax.tree.map(lambda x: abs(x).astype(np.float32), _params(i))) in recipe
    assert "f0.safetensors" not in card.split("---")[1]


def test_fishers_of_other_models_are_told(world, tmp_path, capsys, monkeypatch):
    trees, paths = world()
    monkeypatch.chdir(tmp_path)
    for name, model, fisher in zip("ab", trees["models"], trees["fishers"], strict=True):
        checkpoint.save_params(name, model)
        checkpoint.save_fisher(f"f{name}", fisher, metadata={"base": checkpoint.digest(model)})
    checkpoint.save_fisher("fc", trees["base_fisher"], metadata={"base": checkpoint.digest(trees["base"])})
    models, given = ["a", "b"], {"base": paths["base"], "base_fisher": "fc"}
    merge.files("fisher", models, "o1", fishers=["fa", "fb"])
    merge.files("gradient_matching", models, "o2", fishers=["fa", "fb"], **given)
    merge.files("fisher", models, "o3", fishers=paths["fishers"])  # these do not say
    assert "warning" not in capsys.readouterr().err
    merge.files("gradient_matching", models, "o4", fishers=["fb", "fc"], **(given | {"base_fisher": "fa"}))
    told = capsys.readouterr().err
    assert "the Fisher `fb` says that it is of `b`; here it stands for `a`" in told
    assert "the Fisher `fc` says that it is of `" in told and "`fa` says that it is of `a`" in told
    merge.files("fisher", models, "o5", fishers=["fa", "fc"])
    assert "`fc` says that it is of another model; here it stands for `b`" in capsys.readouterr().err
    with pytest.raises(errors.UsageError, match="one for each of the 2 models; got 1"):
        merge.files("fisher", models, "o6", fishers="fa")
    with pytest.raises(errors.UsageError, match="one for each of the 2 models; got 1"):
        merge.fisher(trees["models"], fishers=trees["fishers"][0])


def test_only_links_out_of_a_folder_are_not_carried(tmp_path):
    source, out = tmp_path / "snapshots" / "abc", tmp_path / "out"
    for folder in (source, out, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "blobs" / "1").write_text('{"n_layer": 3, "torch_dtype": "float32"}')
    (source / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "secret").write_text("{}")
    (source / "vocab.json").symlink_to(tmp_path / "secret")
    _output.carry(source, out, layers=5, dtype="bfloat16")
    assert os.listdir(out) == ["config.json"] and not (out / "config.json").is_symlink()
    assert json.loads((out / "config.json").read_text()) == {"n_layer": 5, "torch_dtype": "bfloat16"}


def test_another_dtype(world, tmp_path):
    trees, paths = world()
    merge.files("average", paths["models"], tmp_path / "out.safetensors", dtype=jnp.bfloat16)
    got = checkpoint.load_params(tmp_path / "out.safetensors")
    want = jax.tree.map(
        lambda x: x if x.dtype.kind == "i" else x.astype(jnp.bfloat16), merge.average(trees["models"])
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
