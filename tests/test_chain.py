"""The whole way on T5 and BERT folders by commands: a Fisher, a mask, a patch, apply, peft and back."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fishjax import checkpoint, cli, models, patches, tree
from fishjax.models import pad

pytest.importorskip("tensorflow_datasets")

pytestmark = pytest.mark.usefixtures("quick")
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


def started(folder, case, rows):
    """A copy of a model, and examples."""
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / case / name, folder / "model")
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))


def trained(folder, config, **names):
    names |= {"MODEL": str(folder / "model"), "DATA": str(folder / "examples.jsonl")}
    bindings = [word for n, x in names.items() for word in ("--gin_bindings", f"{n} = {x!r}")]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax wants it
        assert cli.main(["train", "--gin_file", f"configs/{config}.gin", *bindings]) == 0


@pytest.mark.parametrize("case", ["t5_v1_1", "bert_classifier"])
def test_from_a_fisher_to_a_mask_a_patch_and_a_diff(case, tmp_path, capsys):
    path = lambda name: str(tmp_path / name)
    labels = (lambda row: row[:3]) if case == "t5_v1_1" else (lambda row: row[0] % 2)
    rows = np.random.default_rng(0).integers(3, 40, (16, 6)).tolist()
    started(tmp_path, case, [{"input_ids": row, "labels": labels(row)} for row in rows])
    args = ["--model", path("model"), "--data", path("examples.jsonl"), "--out", path("f")]
    assert cli.main(["fisher", *args]) == 0
    assert cli.main(["mask", "--fisher", path("f"), "--density", "0.05", "--out", path("m")]) == 0
    trained(tmp_path, "train_mask", MASK=path("m"), OUT=path("p"), STEPS=20)
    assert cli.main(["apply", path("p"), "--base", path("model"), "--out", path("new")]) == 0
    assert cli.main(["diff", path("model"), path("new"), "--out", path("d")]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", path("p"), "--json"]) == 0 and "sparse" in capsys.readouterr().out

    mask, (patch, metadata) = (
        tree.flatten(checkpoint.load_mask(path("m"))[0]),
        checkpoint.load_patch(path("p")),
    )
    kept = {n: np.flatnonzero(m) for n, m in mask.items() if m.any()}
    jax.tree.map(np.testing.assert_array_equal, {n: kind.indices for n, kind in patch.items()}, kept)
    assert metadata["recipe"]["from"]["method"] == "topk"
    before, after, by_diff = (
        tree.flatten(x)
        for x in (
            checkpoint.load_params(path("model")),
            checkpoint.load_params(path("new")),
            patches.apply(checkpoint.load_params(path("model")), checkpoint.load_patch(path("d"))[0]),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, by_diff, after)
    moved = {n: (before[n] != after[n]) for n in before}
    assert all(not (moved[n] & ~mask[n]).any() for n in mask)
    assert sum(m.sum() for m in moved.values()) > 0.5 * sum(map(len, kept.values()))


def test_a_patch_made_on_t5_is_applied_and_goes_to_peft_and_back(tmp_path):
    path = lambda name: str(tmp_path / name)
    rows = np.random.default_rng(0).integers(3, 40, (16, 6)).tolist()
    started(tmp_path, "t5_v1_1", [{"input_ids": row, "labels": row[:3]} for row in rows])
    trained(tmp_path, "train_ia3", OUT=path("p.safetensors"), STEPS=5)
    assert cli.main(["apply", path("p.safetensors"), "--base", path("model"), "--out", path("new")]) == 0
    peft = ["--to", "peft", "--model", path("model")]
    assert cli.main(["convert", path("p.safetensors"), path("adapter"), *peft]) == 0

    model, base = models.load(path("model"))
    patch, _ = checkpoint.load_patch(path("p.safetensors"))
    again = checkpoint.load_peft(path("adapter"), model, base)
    assert patch.keys() == again.keys() and len(patch) == 2 * 3 + 2 * 2 * 2 + 5  # k and v, and each wo
    jax.tree.map(np.testing.assert_array_equal, again, patch)

    batch = pad(rows, model) | {"labels": np.array([row[:3] for row in rows], np.int32)}
    apply = jax.jit(model.apply)
    plain, wanted = apply(base, batch), apply(patches.apply(base, patch), batch)
    np.testing.assert_array_equal(apply(models.load(path("new"))[1], batch), wanted)
    unfolded = jax.jit(patches.unfolded(model.apply))
    np.testing.assert_allclose(unfolded(base, patch, batch), wanted, atol=1e-4)
    assert np.abs(wanted - plain).max() > 1e-3
    losses = jax.jit(jax.vmap(models.example_loss(model), (None, 0)))
    assert losses(patches.apply(base, patch), batch).mean() < losses(base, batch).mean()
