"""Conflicts before merging, counted entry by entry here."""

import json
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from fishjax import checkpoint, cli, errors, merge, patches
from fishjax.merge._statistics import GRAIN

RNG = np.random.default_rng(0)
SHAPES = {"emb": (7, 4), "layers.0.w": (6, 5), "layers.0.b": (5,), "layers.1.w": (6, 5)}


def _flat(draw):
    return {n: draw(s) for n, s in SHAPES.items()}


BASE = _flat(lambda s: RNG.standard_normal(s))
STEPS = [_flat(lambda s: RNG.integers(-1, 2, s) * 0.5) for _ in range(2)]
MODELS = [{n: BASE[n] + s[n] for n in BASE} for s in STEPS]
FISHERS = [_flat(lambda s: RNG.random(s)) for _ in range(2)]


def test_counts():
    found = merge.explain(BASE, MODELS)
    assert list(found.layers) == ["emb", "layers.0", "layers.1"]
    for layer, clash in found.layers.items():
        a, b = (np.concatenate([s[n].ravel() for n in SHAPES if n.startswith(layer)]) for s in STEPS)
        assert clash.entries == a.size and clash.changed == [(a != 0).sum(), (b != 0).sum()]
        assert clash.shared == ((a != 0) & (b != 0)).sum() and clash.opposed == (a * b < 0).sum()
    assert found.total.opposed == sum(c.opposed for c in found.layers.values())
    assert found.total.increase is None


def test_predicted_loss_is_that_of_the_fisher_merge():
    found = merge.explain(BASE, MODELS, fishers=FISHERS, weights=[1, 3])
    merged = merge.fisher(MODELS, fishers=FISHERS, weights=[1, 3])
    for i in range(2):
        want = sum(0.5 * (FISHERS[i][n] * (merged[n] - MODELS[i][n]) ** 2).sum() for n in SHAPES)
        np.testing.assert_allclose(found.total.increase[i], want, rtol=1e-9)
    f, g = (np.concatenate([x.ravel() for x in fisher.values()]) for fisher in FISHERS)
    np.testing.assert_allclose(found.total.overlap, np.sqrt(f * g).sum() / np.sqrt(f.sum() * g.sum()))
    assert merge.explain(BASE, MODELS, fishers=[FISHERS[0]] * 2).total.overlap == pytest.approx(1)


def test_what_is_not_merged_is_named():
    found = merge.explain(
        {**BASE, "ids": np.arange(3)}, [{**MODELS[0], "head": np.ones(2)}, {"emb": MODELS[1]["emb"]}]
    )
    assert found.skipped == {"head": "only in model 0", "ids": "int64"}
    assert found.layers["layers.1"].changed[1] == 0
    grown = {**MODELS[1], "emb": np.ones((9, 4))}
    kept = merge.explain(BASE, [MODELS[0], grown], keep=[("^emb", 1)])
    assert kept.skipped == {"emb": "kept from model 1"} and list(kept.layers) == ["layers.0", "layers.1"]
    with pytest.raises(errors.StructureError, match=r"`emb` is .*\[7,4\] .*\[9,4\] in model 1.*`keep`"):
        merge.explain(BASE, [MODELS[0], grown])
    with pytest.raises(errors.StructureError, match=r"`emb`.*model 0"):
        merge.explain(BASE, [{"emb": np.ones(3)}])


def test_fishers_that_do_not_fit_are_told():
    short = {n: f for n, f in FISHERS[1].items() if n != "emb"}
    found = merge.explain(BASE, MODELS, fishers=[FISHERS[0], short])
    assert found.skipped == {"emb": "no Fisher in model 1"} and "emb" not in found.layers
    with pytest.raises(errors.StructureError, match=r"`emb`.*\[7,4\].*\[9,4\] in the Fisher of model 1"):
        merge.explain(BASE, MODELS, fishers=[FISHERS[0], {**short, "emb": np.ones((9, 4))}])
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(errors.UsageError, match=r"`fishers` \(number 1\) must be finite and >= 0; `emb`"):
            merge.explain(BASE, MODELS, fishers=[FISHERS[0], {**short, "emb": np.full((7, 4), bad)}])
    three = [FISHERS[0], FISHERS[1], FISHERS[1]]  # the last two are the same
    assert merge.explain(BASE, [*MODELS, BASE], fishers=three).total.overlap == pytest.approx(1)


def test_files_are_looked_at_block_by_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(0), 40 * GRAIN
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {"layers": {"0": {"w": normal(40, GRAIN), "b": normal(GRAIN + 3)}}, "head": normal(5)}
    some = lambda: np.sort(rng.choice(n, 1000, replace=False)).astype(np.int32)
    changes = [
        {"layers.0.w": patches.Sparse(some(), normal(1000)), "head": patches.Dense(normal(5))},
        {"layers.0.w": patches.LowRank(normal(40, 1, 1), normal(1, GRAIN, 1), 0.5)},
    ]
    checkpoint.save_params("base", base)
    checkpoint.save_params("model", jax.tree.map(lambda x: x + 1, base))
    for i, change in enumerate(changes):
        checkpoint.save_patch(f"p{i}", change, base=base)
    fishers = [jax.tree.map(abs, base)] * 3
    checkpoint.save_fisher("f", fishers[0], metadata={})
    tuned = [jax.tree.map(np.asarray, patches.apply(base, c)) for c in changes]
    want = merge.explain(base, [*tuned, checkpoint.load_params("model")], fishers=fishers, weights=[1, 2, 3])
    tracemalloc.start()
    got = merge.explain_files("base", ["p0", "p1", "model"], fishers=["f"] * 3, weights=[1, 2, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for a, b in zip(got.total, want.total, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert list(got.layers) == list(want.layers) and got.total.changed[0] == 1005
    assert peak < 8 * n  # less than one leaf in float64: for three models and their Fishers


def test_fishers_of_files_are_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"w": np.ones(100, np.float32)}
    checkpoint.save_params("base", base)
    checkpoint.save_fisher("f", base, metadata={})
    checkpoint.save_mask("mask", {"w": np.ones(100, bool)})
    args = ["merge", "--explain", "--base", "base", "--fishers", "f"]
    assert cli.main([*args, "mask", "--", "base", "base"]) == 3
    assert "`mask` is a mask file; wanted a fisher" in capsys.readouterr().err
    assert cli.main([*args, "f", "--", "base", "mask"]) == 3
    data = bytearray(Path("f").read_bytes())
    data[-1] ^= 1
    Path("g").write_bytes(data)
    assert cli.main([*args, "g", "--", "base", "base"]) == 3
    assert "`g` is corrupt" in capsys.readouterr().err


def test_two_patches_that_clash_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"layers": {"0": {"w": np.zeros((4, 4), np.float32)}}, "head": np.ones(3, np.float32)}
    checkpoint.save_params("base.safetensors", base)
    for name, indices, values in (("p", [0, 5, 9], [1, 1, 1]), ("q", [5, 9, 12], [-1, 1, 1])):
        patch = {"layers.0.w": patches.Sparse(np.int32(indices), np.float32(values))}
        checkpoint.save_patch(name, patch, base=base)
    checkpoint.save_fisher("f", jax.tree.map(np.ones_like, base), metadata={})
    args = ["merge", "--explain", "--base", "base.safetensors", "p", "q"]
    assert cli.main([*args, "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert (total["changed"], total["shared"], total["opposed"]) == ([3, 3], 2, 1)
    assert cli.main([*args, "--fishers", "f", "f"]) == 0
    text = capsys.readouterr().out
    assert "layers.0" in text and "in all" in text and "loss p" in text
    assert cli.main([*args, "--keep", "layers=1"]) == 0
    assert "not merged: `layers.0.w` (kept from model 1)" in capsys.readouterr().out
    assert cli.main(["merge", "--explain", "p", "q"]) == 2
    assert "--base" in capsys.readouterr().err
    assert cli.main([*args, "--method", "ties"]) == 2 and "leave out --method" in capsys.readouterr().err
