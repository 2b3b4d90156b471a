"""The whole way on a T5 folder: train a patch, apply it, hand it to peft, read it back; all by commands."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fishjax import checkpoint, cli, models, patches
from fishjax.models import pad

pytest.importorskip("tensorflow_datasets")
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "models" / "t5_v1_1"


def test_a_patch_made_on_t5_is_applied_and_goes_to_peft_and_back(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(FIXTURE / name, tmp_path / "model")
    rows = np.random.default_rng(0).integers(3, 40, (16, 6)).tolist()
    lines = [json.dumps({"input_ids": row, "labels": row[:3]}) for row in rows]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    path = lambda name: str(tmp_path / name)
    bound = {"MODEL": path("model"), "DATA": path("examples.jsonl"), "OUT": path("p.safetensors"), "STEPS": 5}
    bindings = [word for n, x in bound.items() for word in ("--gin_bindings", f"{n} = {x!r}")]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax wants it
        assert cli.main(["train", "--gin_file", "configs/train_ia3.gin", *bindings]) == 0
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
