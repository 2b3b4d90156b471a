"""Recipes of `fishjax merge`, with mergekit's own outputs as the oracle; and what a bad one is told."""

import json
from pathlib import Path

import numpy as np
import pytest

from fishjax import checkpoint, cli, errors, merge, patches, tree
from tests import mergekit_world
from tests.mergekit_world import HERE, MODELS

HUGE = 10**400
RECIPES = sorted(p.stem for p in HERE.glob("*.yaml"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return mergekit_world.enter(tmp_path, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_mergekit_give_what_mergekit_gives(recipe, folder, capsys):
    wanted = checkpoint.load_params(HERE / "outputs.safetensors")
    wanted = {
        n.removeprefix(recipe + "/"): x for n, x in tree.flatten(wanted).items() if n.startswith(recipe + "/")
    }
    assert cli.main(["merge", str(HERE / f"{recipe}.yaml"), "out"]) == 0
    got = tree.flatten(checkpoint.load_params("out"))
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-6, err_msg=name)
    assert "sha256:" in capsys.readouterr().out
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == (
        6 if recipe == "passthrough" else 4
    )
    assert "base_model_relation: merge" in Path("out/README.md").read_text()


def test_dare_recipes_agree_in_distribution(folder):
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((400, 500)).astype(np.float32)}
    tuned = {"w": base["w"] + rng.standard_normal((400, 500)).astype(np.float32)}
    checkpoint.save_params("b.safetensors", base)
    checkpoint.save_params("t.safetensors", tuned)
    model = "{model: t.safetensors, parameters: {weight: 1.0, density: 0.3}}"
    Path("r.yaml").write_text(f"merge_method: dare_linear\nbase_model: b.safetensors\nmodels: [{model}]")
    merge.run_recipe("r.yaml", "out.safetensors")
    got = checkpoint.load_params("out.safetensors")["w"] - base["w"]
    kept = got != 0
    assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.21 / kept.size)
    delta = tuned["w"] - base["w"]
    np.testing.assert_allclose(abs(got).sum(), abs(delta).sum(), rtol=1e-5)  # the L1 norm is restored
    assert np.ptp(got[kept & (abs(delta) > 0.5)] / delta[kept & (abs(delta) > 0.5)]) < 1e-5  # by one factor


def test_dare_ties_recipes_agree_in_distribution(folder):
    rng, n = np.random.default_rng(0), 200_000
    base = rng.standard_normal(n).astype(np.float32)
    signs = np.float32(rng.choice([-1, 1], n))
    for name, x in (("b", base), ("t", base + 1), ("u", base + 2 * signs)):
        checkpoint.save_params(f"{name}.safetensors", {"w": x})
    model = "{model: %s.safetensors, parameters: {weight: 1.0, density: %s}}"
    models = f"[{model % ('t', 0.3)}, {model % ('u', 0.5)}]"
    Path("r.yaml").write_text(f"merge_method: dare_ties\nbase_model: b.safetensors\nmodels: {models}")
    merge.run_recipe("r.yaml", "out.safetensors")
    got = checkpoint.load_params("out.safetensors")["w"] - base
    # Kept changes are 1 / 0.3 and 2 / 0.5. Those of one sign add up, of two signs the larger stays alone.
    together, apart = got[signs > 0], got[signs < 0]
    for values, value, chance in (
        (together, 1 / 0.3 + 4, 0.3 * 0.5),
        (together, 1 / 0.3, 0.3 * 0.5),
        (together, 4, 0.7 * 0.5),
        (together, 0, 0.7 * 0.5),
        (apart, 1 / 0.3, 0.3 * 0.5),
        (apart, -4, 0.5),
        (apart, 0, 0.7 * 0.5),
    ):
        share = (abs(values - value) < 0.1).mean()
        assert abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / values.size), (value, chance)
    variance = 1 / 0.3 - 1 + 4 / 0.5 - 4  # of what is kept with probability p and divided by it
    assert abs(together.mean() - 3) < 5 * np.sqrt(variance / together.size)
    assert abs(together.var() / variance - 1) < 0.03


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("merge_method: della\nmodels: []", "`della` is not supported; there are linear"),
        ("merge_method: linear\nmodels: []\ntokenizer_source: union", "`tokenizer_source` is not supported"),
        ("merge_method: linear\nmodels: []\nmodlez: 3", "`modlez` is not supported"),
        ("merge_method: linear", "`models` or `slices`"),
        ("merge_method: linear\nmodels: [{model: one, parameters: {wieght: 1}}]", "`wieght`"),
        ("merge_method: linear\nmodels: [{model: one}, {model: two}]", "sets no `weight` for"),
        (
            "merge_method: linear\nmodels: [{model: nowhere, parameters: {weight: 1}}]",
            "`nowhere` is neither in",
        ),
        ("merge_method: ties\nmodels: [{model: one, parameters: {weight: 1}}]", "needs a `base_model`"),
        (
            "merge_method: ties\nbase_model: base\nmodels: [{model: one, parameters: {weight: 1}}]\n"
            "parameters: {rescale: true}",
            "`rescale: true`",
        ),
        (
            "merge_method: slerp\nbase_model: one\nparameters: {t: 0.5}\nslices:\n"
            "- sources: [{model: one, layer_range: [0, 9]}, {model: two, layer_range: [0, 9]}]",
            "has 4 layers",
        ),
        ("method: average\nmodels: one", "must be a list"),
        ("method: average\nmodels: [one, two]\nkeep: [norm]", "[regex, number"),
        ("method: average\nmodels: [one, two]\nkeep: 3", "must be a list"),
        ("method: average\nmodels: [one, two]\nout: x", "does not belong"),
        ("method: fisher\nmodels: [one, two]\nfishers: 3", "a path or a list"),
        ("method: 3\nmodels: [one, two]", "`3` is no merge method"),
        ("merge_method: linear\nmodels: []", "not empty"),
        ("merge_method: linear\nmodels: [one]", "must be a mapping"),
        ("merge_method: linear\nslices: [{parameters: {weight: 1}}]", "`sources`"),
        ("merge_method: linear\nmodels: [{model: one, parameters: 3}]", "must be a mapping"),
        ("merge_method: linear\nmodels: [{model: one, parameters: {weight: x}}]", "must be a number"),
        ("merge_method: {a: b}\nmodels: [{model: one}]", "is not supported"),
        ("method: average\nmodels: [one, two]\nwieghts: [1, 2]", "no option `wieghts`"),
        ("method: average\nmodels: [one, two]\ndtype: int4", "`dtype` must be one of"),
        ("models: [one]", "is no recipe"),
        ("merge_method: linear\nmodels: [{model: one}]\n1: 3\nx: 4", "`1` is not supported"),
        (
            f"merge_method: linear\nmodels: [{{model: one, parameters: {{weight: {HUGE}}}}}]",
            "beyond all floats",
        ),
        (
            f"merge_method: linear\nmodels: [{{model: one, parameters: {{weight: [1, {HUGE}]}}}}]",
            "beyond all",
        ),
        (f"method: average\nmodels: [one, two]\nweights: [1, {HUGE}]", "beyond all floats"),
        ("method: average\nmodels: [one, two]\nweights: [1, true]", "`weights` must be a number; got True"),
        ("method: average\nmodels: [one, two]\nnormalize: 'no'", "must be true or false; got 'no'"),
        (
            "merge_method: linear\nparameters: {weight: 1, normalize: 'no'}\nmodels: [{model: one}]",
            "must be true or false; got 'no'",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [true, 2]}]}]",
            "`layer_range` must be",
        ),
        ("a: [", "is not YAML"),
        ("method: average\nmodels: [one, two]\nmodels: [one]", "has the key `models` twice"),
    ],
)
def test_bad_recipes(text, wrong, folder, capsys):
    Path("r.yaml").write_text(text)
    assert cli.main(["merge", "r.yaml", "out"]) == 2
    error = capsys.readouterr().err
    assert wrong in error and error.count("\n") == 1
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("kind", ["mask", "fisher", "patch"])
def test_only_models_are_taken_for_models(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"w": np.ones(3, np.float32)}
    checkpoint.save_params("base", base)
    checkpoint.save_params("one", base)
    checkpoint.save_fisher("fisher", base, metadata={})
    checkpoint.save_mask("mask", {"w": np.array([True, False, True])})
    checkpoint.save_patch("patch", {"w": patches.Sparse(np.int32([1]), np.float32([5]))}, base=base)
    recipe = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: one}}, {{model: {}}}]"
    Path("r.yaml").write_text(recipe.format(kind))
    Path("b.yaml").write_text(recipe.format(kind) + "\nbase_model: base")
    Path("s.yaml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nbase_model: {kind}\nmodels: [{{model: one}}]"
    )
    no_model = 3, f"`{kind}` is a {kind} file; wanted a model"
    no_base = (2, "is a patch; give the `base") if kind == "patch" else no_model
    average = ["--method", "average", "--out", "out"]
    for args, (code, wrong) in (
        (["r.yaml", "out"], no_base),
        ([*average, kind, kind], no_base),
        (["s.yaml", "out"], no_model),
    ):
        assert cli.main(["merge", *args]) == code
        assert wrong in capsys.readouterr().err
    assert cli.main(["merge", "b.yaml", "out.safetensors"]) == (0 if kind == "patch" else 3)
    if kind == "patch":  # folded, like anywhere
        np.testing.assert_array_equal(
            checkpoint.load_params("out.safetensors")["w"], np.float32([1, 7 / 3, 1])
        )
    if kind == "mask":
        args = ["merge", "--method", "fisher", "--out", "o", "--fishers", "mask", "mask", "--", "one", "base"]
        assert cli.main(args) == 3 and "wanted a fisher" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*")) and not list(tmp_path.glob("out"))


def test_what_only_a_later_model_has_is_not_dropped(folder, capsys):
    more = {**MODELS["two"], "extra.weight": np.ones(2, np.float32)}
    deep = {**MODELS["two"], "model.layers.1.extra": np.ones(2, np.float32)}
    less = {n: x for n, x in MODELS["two"].items() if n != "lm_head.weight"}
    for name, params in (("more", more), ("deep", deep), ("less", less)):
        checkpoint.save_params(name, tree.nest(params))
    models = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: one}}, {{model: {}}}]"
    sliced = (
        "merge_method: passthrough\nslices:\n- sources: [{{model: one, layer_range: [0, 2]}}]\n"
        "- sources: [{{model: {}, layer_range: [0, 2]}}]"
    )
    for recipe, name, wrong in (
        (models, "more", "only in `one`: none; only in `more`: `extra.weight`"),
        (models, "deep", "only in `deep`: `model.layers.1.extra`"),
        (models, "less", "only in `one`: `lm_head.weight`"),
        (sliced, "more", "only in `more`: `extra.weight`"),
    ):
        Path("r.yaml").write_text(recipe.format(name))
        assert cli.main(["merge", "r.yaml", "out"]) == 4
        assert wrong in capsys.readouterr().err
    Path("r.yaml").write_text(sliced.format("deep"))  # each slice has but one source
    assert cli.main(["merge", "r.yaml", "out"]) == 0
    assert "model.layers.3.extra" in tree.flatten(checkpoint.load_params("out"))


def test_a_recipe_and_its_output(folder, capsys):
    Path("r.yaml").write_text("method: average\nmodels: [one, two]")
    assert cli.main(["merge", "r.yaml", "--dry-run"]) == 0
    assert "writes" in capsys.readouterr().out
    assert cli.main(["merge", "r.yaml", "--out", "out"]) == 0 and Path("out/model.safetensors").exists()
    assert cli.main(["merge", "r.yaml", "out", "--dry-run"]) == 2 and "exists" in capsys.readouterr().err
    assert cli.main(["merge", str(HERE / "linear.yaml"), "out", "--dry-run"]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["merge", "r.yaml"]) == 2 and "RECIPE.yaml OUT" in capsys.readouterr().err
    assert cli.main(["merge", "r.yaml", "a", "b"]) == 2


def test_paths_resolve_from_the_recipe_too(folder, tmp_path_factory, monkeypatch):
    (folder / "r.yaml").write_text(
        "method: task_arithmetic\nbase: base\nmodels: [one, two]\nweights: [0.5, -0.5]\n"
        "keep: [[norm, 1]]\ndtype: bfloat16"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    merge.run_recipe(folder / "r.yaml", "out.safetensors")
    got = tree.flatten(checkpoint.load_params("out.safetensors"))
    want = merge.task_arithmetic(
        [MODELS["one"], MODELS["two"]], base=MODELS["base"], weights=[0.5, -0.5], keep=[("norm", 1)]
    )
    for name, x in want.items():
        kept = "norm" in name
        assert got[name].dtype == (np.float32 if kept else "bfloat16")
        np.testing.assert_allclose(got[name].astype(np.float32), x, rtol=0 if kept else 2**-8)


def test_a_recipe_that_cannot_be_read():
    with pytest.raises(errors.UsageError, match="is neither"):
        merge.run_recipe(HERE / "linear.yaml", "/tmp/never")
