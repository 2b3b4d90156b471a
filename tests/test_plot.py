"""Plots are files that can be read, the same for the same data; what cannot be drawn is said."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, cli, mesh, models, plot
from fishjax.errors import UsageError

pytest.importorskip("matplotlib")
PNG, SVG = b"\x89PNG", b"<?xml"


def params():
    names = {f"block_{i}": {"attn": {"kernel": (4, 6)}, "bias": (3,)} for i in (0, 2, 10)}
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.random(s) ** 8, jnp.float32)
    return jax.tree.map(draw, names | {"head": (5,)}, is_leaf=lambda x: isinstance(x, tuple))


def heads(files):
    return [f.read_bytes()[: len(head)] for f, head in zip(files, (PNG, SVG), strict=True)]


def test_every_plot_is_written_twice_and_has_the_same_bytes_again(tmp_path):
    fisher = params()
    mask = jax.tree.map(lambda x: x > 0.1, fisher)
    draw = {
        "fisher": lambda path: plot.fisher_histograms(fisher, path),
        "mask": lambda path: plot.mask_density(mask, path),
        "sweep": lambda p: plot.merge_sweep([0, 0.5, 1], {"average": [0.1, 0.9, 0.2]}, p, ends=("a", "b")),
        "bars": lambda p: plot.accuracies({"base": {"x": 0.1, "y": 0.2}, "merged": {"x": 0.5, "y": 0.6}}, p),
    }
    for name, function in draw.items():
        first, again = function(tmp_path / name), function(tmp_path / f"{name}_again")
        assert heads(first) == [PNG, SVG]
        assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again], name


def test_layers_are_in_natural_order_and_hold_their_shares():
    kept = {"block_10.w": (1, 4), "block_2.w": (2, 4), "head": (3, 6), "block_2.b": (0, 1)}
    rows, columns, cells = plot._by_layer(kept)
    assert rows == ["block_2", "block_10", "head"] and columns == ["-", "b", "w"]
    assert cells == [[(0, 0), (0, 1), (2, 4)], [(0, 0), (0, 0), (1, 4)], [(3, 6), (0, 0), (0, 0)]]


def test_a_fisher_is_counted_by_layer_up_to_its_largest_entry():
    """Sixty bins over six powers of ten: each a tenth wide."""
    fisher = {
        "block_10": {"w": np.array([[1e-4, 1e2], [0, 0]])},
        "block_2": {"w": 10 ** np.array([-3.95, -0.95, -0.95]), "b": np.array([1e2])},
        "head": np.zeros(3),
    }
    rows, edges, heights = plot._powers_by_layer(fisher)
    assert list(rows.items()) == [("block_2", 0), ("block_10", 0.5), ("head", 1)]
    np.testing.assert_allclose(edges, np.linspace(-4, 2, 61), atol=1e-6)
    want = np.zeros((3, 60), int)
    want[0, [0, 30, 59]] = 1, 2, 1
    want[1, [0, 59]] = 1
    np.testing.assert_array_equal(heights, want)


def test_the_command_draws_beside_the_file(tmp_path, capsys):
    checkpoint.save_fisher(tmp_path / "f.safetensors", params(), metadata={})
    assert cli.main(["plot", "fisher", str(tmp_path / "f.safetensors")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "f.png"), str(tmp_path / "f.svg")]
    assert cli.main(["plot", "mask", str(tmp_path / "f.safetensors")]) == 3
    assert cli.main(["plot", "fisher", str(tmp_path / "none.safetensors")]) == 2


def test_a_zero_fisher_is_refused(tmp_path):
    with pytest.raises(UsageError, match="zero everywhere"):
        plot.fisher_histograms({"w": np.zeros(3)}, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_the_layout_of_a_folder_is_a_table_and_a_plot(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(pathlib.Path(__file__).parent / "fixtures" / "models" / "gpt2", folder)
    model, loaded = models.load(folder)
    assert cli.main(["plot", "mesh", str(folder), "--axes", "fsdp=2", "tensor=2"]) == 0
    text = capsys.readouterr().out
    on = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    table = mesh.table(loaded, mesh.rules(model, on), on)
    parts = mesh.shard(loaded, mesh.rules(model, on), mesh.make({"fsdp": 2, "tensor": 2}))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(parts))
    assert table.bytes_per_device == held and table.bytes == sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert str(table) in text and f"each of 4 devices (fsdp=2, tensor=2): {held:,} of" in text
    assert heads([tmp_path / "model-mesh.png", tmp_path / "model-mesh.svg"]) == [PNG, SVG]
    for wrong in ([], ["--axes", "fsdp"], ["--axes", "fsdp=0"], ["--axes", "fsdp=2", "fsdp=2"]):
        assert cli.main(["plot", "mesh", str(folder), *wrong]) == 2
    # Without weights the config alone tells, here of a vocabulary that two devices do not divide.
    (folder / "model.safetensors").unlink()
    assert cli.main(["plot", "mesh", str(folder), "--axes", "tensor=2", "--out", str(tmp_path / "x")]) == 0
    assert "whole: the axes of this dimension" in capsys.readouterr().out
