"""`fishjax merge`: methods and recipes from the command line; mergekit's own outputs as the oracle."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fishjax import checkpoint, cli, errors, merge, patches, tree

HERE = Path(__file__).parent / "fixtures" / "mergekit"
HUGE = 10**400
RECIPES = sorted(p.stem for p in HERE.glob("*.yaml"))


def _maker():
    spec = importlib.util.spec_from_file_location("make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = _maker().models()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The models that the recipes name, in the working directory."""
    for name, tensors in MODELS.items():
        checkpoint.save_params(tmp_path / name, tree.nest(tensors))
        (tmp_path / name / "config.json").write_text(json.dumps(_maker().config()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_methods_from_the_command_line(folder, capsys):
    fishers = [{n: abs(x) for n, x in MODELS[m].items()} for m in ("two", "three")]
    for i, fisher in enumerate(fishers):
        checkpoint.save_fisher(f"f{i}.fisher", tree.nest(fisher), metadata={})
    args = [
        "merge",
        "--method",
        "fisher",
        "--fishers",
        "f0.fisher",
        "f1.fisher",
        "--weights",
        "1",
        "2",
        "--set",
        "floor=0.01",
        "normalize=true",
    ]
    assert cli.main([*args, "--keep", "^lm_head=1", "--json", "--out", "out", "one", "two"]) == 0
    printed = json.loads(capsys.readouterr().out)
    want = merge.fisher(
        [MODELS["one"], MODELS["two"]],
        fishers=fishers,
        weights=[1, 2],
        floor=0.01,
        normalize=True,
        keep=[("^lm_head", 1)],
    )
    assert printed == {"out": "out", "digest": checkpoint.digest(want)}
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(checkpoint.load_params("out")), want)
    assert cli.main([*args, "--dry-run", "--json", "one", "two"]) == 0
    size = sum(x.nbytes for x in want.values())
    cost = json.loads(capsys.readouterr().out)
    assert cost["write"] == size + Path("two/config.json").stat().st_size and cost["read"] > 6 * size
    assert cli.main(["merge", "--methods"]) == 0
    listed = capsys.readouterr().out
    assert all(m in listed for m in merge.METHODS) and "density=required" in listed


@pytest.mark.parametrize(
    "args, code, wrong",
    [
        (["--method", "avrage", "--out", "o", "one", "two"], 2, "no merge method"),
        (["--method", "average", "one", "two"], 2, "give --out"),
        (["--method", "regmean", "--out", "o", "one", "two"], 2, "`merge.regmean` takes the models"),
        (["--method", "average", "--out", "one", "one", "two"], 2, "is an input"),
        (["--method", "average", "--out", ".", "one", "two"], 2, "`.` names no new file"),
        (["--method", "average", "--out", "", "one", "two"], 2, "`` names no new file"),
        (["--method", "average", "--out", "out-there", "--dry-run", "one", "two"], 2, "exists"),
        (["--method", "average", "--out", "one/x", "one", "two"], 2, "lies in one"),
        (["--method", "average", "--out", "one", "--dry-run", "one", "two"], 2, "is an input"),
        (["--method", "average", "--out", "o", "one", "nowhere"], 2, "nowhere"),
        (["--method", "average", "--out", "o", "--weights", "1", "-1", "one", "two"], 2, "sum to zero"),
        (["--method", "average", "--out", "o", "--weights", "1", "nan", "--", "one", "two"], 2, "finite"),
        (["--method", "average", "--out", "o", "--weights", "x", "--", "one", "two"], 2, "wants numbers"),
        (["--method", "average", "--out", "o", "--set", "x", "--", "one", "two"], 2, "K=V"),
        (["--method", "average", "--out", "o", "--set", "out=p", "--", "one", "two"], 2, "--set out"),
        (["--method", "average", "--out", "o", "--keep", "x", "--", "one", "two"], 2, "REGEX=I"),
        (["--method", "average", "--out", "o", "--weights", "1", "-inf", "one", "two"], 2, "finite"),
        (["--method", "average", "--out", "o", "--set", "normalize=maybe", "one", "two"], 2, "true or false"),
        (["--method", "average", "--out", "o", "--set", "weights=" + "9" * 5000, "one", "two"], 2, "--set"),
        (
            ["--method", "fisher", "--out", "o", "--set", "favor=true", "--", "one", "two"],
            2,
            "an integer; got True",
        ),
        (
            ["--method", "average", "--out", "o", "--dtype", "float16", "wide.safetensors"],
            2,
            "`v` has entries beyond what float16 can hold",
        ),
        (
            ["--method", "ties", "--out", "o", "--set", "density=0.5", "--", "one", "two"],
            2,
            "`base` must be given",
        ),
        (
            ["--method", "average", "--out", "o", "a.safetensors", "x.safetensors"],
            4,
            "only in model 0: `v`; only in model 1: `x`",
        ),
        (
            ["--method", "average", "--out", "o", "a.safetensors", "short.safetensors"],
            4,
            "`w` is float32[2,3] in model 0 and float32[3] in model 1",
        ),
        (
            ["--method", "average", "--out", "o", "a.safetensors", "half.safetensors"],
            4,
            "model 0 is `a.safetensors`, model 1 is `half.safetensors`",
        ),
        (["--method", "average", "--out", "o", "--weights", "1", "2", "3", "--", "one", "two"], 2, "got 3"),
        (["--method", "fisher", "--out", "o", "one", "two"], 2, "`fishers` must be given"),
        (
            ["--method", "fisher", "--out", "o", "--fishers", "a.safetensors", "--", "a.safetensors"],
            2,
            "must be finite and >= 0, and at most 8.5e+37 for sums to be finite; `v` is not everywhere",
        ),
        (["k.yaml", "o"], 2, "`wieght`"),
        (
            ["shapes.yaml", "o"],
            4,
            "`v` is float32[2] in `a.safetensors` and float32[1] in `half.safetensors`",
        ),
        (["--method", "average", "--out", "o", "one", "broken.safetensors"], 3, "broken"),
        (["one", "two"], 2, "--method"),
        (["r.yaml", "o", "--base", "base"], 2, "belongs in the recipe"),
    ],
)
def test_bad_arguments(args, code, wrong, folder, capsys):
    w, v = np.ones((2, 3), np.float32), np.float32([1, -1])
    for name, params in {
        "a": {"w": w, "v": v},
        "x": {"w": w, "x": v},
        "short": {"w": w[0], "v": v},
        "wide": {"w": w, "v": 70000 * v},
        "half": {"w": w.astype(np.float16), "v": v[:1]},
    }.items():
        checkpoint.save_params(f"{name}.safetensors", params)
    models = "[{model: a.safetensors}, {model: half.safetensors}]"
    Path("shapes.yaml").write_text(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: {models}")
    Path("k.yaml").write_text("method: average\nwieght: 1\nmodels: [one, two]")
    Path("out-there").touch()
    Path("broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    Path("r.yaml").write_text("method: average\nmodels: [one, two]")
    assert cli.main(["merge", *args]) == code
    error = capsys.readouterr().err
    assert wrong in error and error.count("\n") == 1
    assert not (folder / "o").exists() and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_disk_that_is_full_at_any_call(out, tmp_path, capsys, monkeypatch):
    """Whichever write is refused: one line, exit code 74, and nothing half-written."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        checkpoint.save_params(name, {"v": np.ones(3), "w": np.ones(4)})
        Path(name, "config.json").write_text("{}")
    merged = lambda: cli.main(["merge", "--method", "average", "--out", out, "a", "b"])
    left = 0

    def refusing(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return call

    monkeypatch.setattr("fishjax.merge._output.SECONDS", 0.0)  # every piece is noted
    monkeypatch.setattr("os.fsync", lambda fd: None)
    for module, name in (
        (os, "pwrite"),
        (os, "write"),
        (os, "ftruncate"),
        (os, "replace"),
        (shutil, "copyfile"),
    ):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    assert merged() == 0
    calls = -left
    shutil.rmtree(out) if out == "out" else os.unlink(out)
    assert calls >= 8
    for n in range(1, calls + 1):
        left = n
        capsys.readouterr()
        assert merged() == 74
        error = capsys.readouterr().err
        assert f"`{out}`: No space left" in error and error.count("\n") == 1
        assert sorted(os.listdir()) == ["a", "b"]


def test_the_command_never_imports_jax(folder):
    code = "import sys; from fishjax import cli; print(cli.main(sys.argv[1:]), 'jax' in sys.modules)"
    for args in (
        ["--method", "ties", "--base", "base", "--set", "density=0.3", "--out", "o1", "one", "two"],
        [str(HERE / "slerp.yaml"), "o2"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "merge", *args],
            capture_output=True,
            text=True,
            cwd=folder,
            env={"PYTHONPATH": str(HERE.parents[2])},
        )
        assert done.stdout.endswith("0 False\n"), done.stderr


def test_a_recipe_that_cannot_be_read():
    with pytest.raises(errors.UsageError, match="is neither"):
        merge.run_recipe(HERE / "linear.yaml", "/tmp/never")


def test_negative_weights_in_any_form(folder):
    given = ["-0.1", "-1e-1", "-1.e-1", "-.1E0"]
    for i, weight in enumerate(given):
        args = ["merge", "--method", "task_arithmetic", "--base", "base", "--out", f"o{i}.safetensors"]
        assert cli.main([*args, "--weights", weight, "1", "--", "one", "two"]) == 0
    assert len({Path(f"o{i}.safetensors").read_bytes() for i in range(len(given))}) == 1


def test_patches_merge_like_the_models_they_make(folder, capsys):
    base = tree.nest(MODELS["base"])
    merged = []
    for i, name in enumerate(("p", "q")):
        rng = np.random.default_rng(i)
        changed = {
            n: patches.Sparse(np.int32([1, 3]), rng.standard_normal(2).astype(np.float32))
            for n in ("lm_head.weight", "model.norm.weight")
        }
        checkpoint.save_patch(name, changed, base=base)
        merged.append(jax.tree.map(np.asarray, patches.apply(base, changed)))
        fisher = jax.tree.map(lambda x, i=i: abs(x) + np.float32(i), base)
        checkpoint.save_fisher(f"f{i}", fisher, metadata={})
    fishers = [checkpoint.load_fisher(f"f{i}")[0] for i in range(2)]
    for method, options, more in (
        ("average", {}, []),
        ("ties", {"base": base, "density": 0.5}, ["--set", "density=0.5"]),
        ("fisher", {"fishers": fishers}, ["--fishers", "f0", "f1"]),
    ):
        assert (
            cli.main(
                ["merge", "--method", method, "--base", "base", *more, "--out", f"out-{method}", "p", "q"]
            )
            == 0
        )
        want = getattr(merge, method)(merged, **options)
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(f"out-{method}"), want)
    assert "sha256:" in Path("out-average/README.md").read_text()
    capsys.readouterr()
    assert cli.main(["merge", "--method", "average", "--out", "o", "p", "q"]) == 2
    assert "is a patch; give the `base`" in capsys.readouterr().err
    assert cli.main(["merge", "--method", "average", "--base", "one", "--out", "o", "p", "q"]) == 4
    assert "for another base" in capsys.readouterr().err
