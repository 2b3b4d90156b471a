"""`fishjax merge`: methods and options from the command line, what bad arguments are told, full disks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fishjax import checkpoint, cli, merge, patches, tree
from tests import mergekit_world
from tests.mergekit_world import HERE, MODELS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return mergekit_world.enter(tmp_path, monkeypatch)


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
