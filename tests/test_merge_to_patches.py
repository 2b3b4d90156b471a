"""`fishjax merge --method patches` and `--method information`: patch files make a patch file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, cli, merge, patches, tree

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
some = lambda n, size: np.sort(RNG.choice(size, n, replace=False)).astype(np.int32)
BASE = {"a": {"w": normal(6, 8), "b": normal(8)}, "c": normal(50)}
LOW_RANK = [{"a.w": patches.LowRank(normal(6, 1, 2), normal(1, 8, 2), 0.5 + i)} for i in range(2)]
SCALES = [{"a.w": patches.Scale(1 + abs(normal(1, 8)))} for _ in range(2)]
SPARSE = [{"c": patches.Sparse(some(20, 50), normal(20))} for _ in range(3)]
SPARSE[1] |= {"a.b": patches.Dense(normal(8))}
PRECISIONS = [{n: abs(normal(20 if n == "c" else 8)) for n in patch} for patch in SPARSE]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_params("base", BASE)
    for word, patches_of in (("l", LOW_RANK), ("s", SCALES)):
        for i, patch in enumerate(patches_of):
            checkpoint.save_patch(f"{word}{i}", patch, base=BASE)
    for i, (patch, known) in enumerate(zip(SPARSE, PRECISIONS, strict=True)):
        checkpoint.save_patch(f"p{i}", patch, base=BASE, precision=tree.nest(known))
    checkpoint.save_patch("none", SPARSE[0], base=BASE)
    return tmp_path


def _merge(method, out, *args):
    return cli.main(["merge", "--method", method, "--base", "base", "--out", out, *args])


def _same(path, want, rtol=0.0):
    got = checkpoint.load_patch(path)[0]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, want)


@pytest.mark.parametrize(
    "given, options, args",
    [
        (LOW_RANK, {}, ["l0", "l1"]),
        (LOW_RANK, {"rank": 1}, ["--set", "rank=1", "l0", "l1"]),
        (LOW_RANK, {"weights": [0.5, -0.1]}, ["--weights", "0.5", "-1e-1", "l0", "l1"]),
        (SCALES, {"scales": "logs"}, ["--set", "scales=logs", "s0", "s1"]),
        (SPARSE[:2], {"weights": [1, 2]}, ["--weights", "1", "2", "p0", "p1"]),
        ([*SCALES, *LOW_RANK], {}, ["s0", "s1", "l0", "l1"]),
    ],
)
def test_patches_make_a_patch(given, options, args, capsys):
    assert _merge("patches", "out", *args) == 0
    assert capsys.readouterr().out.startswith("out: sha256:")
    _same("out", merge.patches(BASE, given, **options), rtol=1e-6)
    assert checkpoint.load_patch("out")[1]["parents"] == args[-len(given) :]


def _known(*numbers):
    parts = [merge.information(BASE, SPARSE[i], tree.nest(PRECISIONS[i])) for i in numbers]
    return merge.add(*parts)


def test_information_makes_a_patch_that_carries_its_own(capsys):
    assert _merge("information", "all", "--set", "prior=0.5", "--", "p0", "p1", "p2") == 0
    _same("all", merge.resolve(BASE, _known(0, 1, 2), prior=0.5))
    for name, evidence in _known(0, 1, 2).items():
        np.testing.assert_array_equal(checkpoint.load_precision("all")[name], evidence.precision)
    # Merged again, with another one, as if all had come at once; and in any order.
    assert _merge("information", "two", "p2", "p1") == 0
    assert _merge("information", "again", "--set", "prior=0.5", "--", "two", "p0") == 0
    _same("again", merge.resolve(BASE, _known(0, 1, 2), prior=0.5), rtol=1e-5)
    assert _merge("information", "more", "all", "p0") == 2  # it moves less than its evidence
    assert "`all` was merged under a prior" in capsys.readouterr().err


@pytest.mark.parametrize("prior", ["prior=0", "prior=0.25"])
@pytest.mark.parametrize("of", [["p0", "p1", "p2"], ["merged"]])
def test_what_is_revoked_was_never_merged(prior, of):
    assert _merge("information", "merged", "p0", "p1", "p2") == 0
    assert _merge("information", "left", "--set", "revoke=p1", prior, "--", *of) == 0
    assert _merge("information", "never", "--set", prior, "--", "p0", "p2") == 0
    _same("left", checkpoint.load_patch("never")[0], rtol=1e-4)
    assert set(checkpoint.load_patch("left")[0]) == {"c"}
    assert _merge("information", "one", "--set", "revoke=[p1, p2]", prior, "--", *of) == 0
    assert checkpoint.load_patch("one")[0]["c"].indices.tolist() == SPARSE[0]["c"].indices.tolist()


def test_a_recipe_of_patches(folder, capsys):
    (folder / "sub").mkdir()
    for name in ("p1", "p2", "l0", "l1"):
        (folder / name).rename(folder / "sub" / name)  # paths in a recipe are sought from its folder too
    recipe = folder / "sub" / "recipe.yaml"
    recipe.write_text("{method: information, base: base, models: [p0, p1, p2], revoke: p1, prior: 0.5}")
    assert cli.main(["merge", str(recipe), "out"]) == 0
    _same("out", merge.resolve(BASE, _known(0, 2), prior=0.5), rtol=1e-4)
    assert cli.main(["merge", str(recipe), "--dry-run"]) == 2
    assert "writes a patch file" in capsys.readouterr().err
    recipe.write_text("{method: information, base: base, models: [p0, p2], revoke: null, prior: 0.5}")
    assert cli.main(["merge", str(recipe), "same"]) == 0
    _same("same", merge.resolve(BASE, _known(0, 2), prior=0.5))
    recipe.write_text("{method: patches, base: base, models: [l0, l1], weights: [1, 2], rank: 2}")
    assert cli.main(["merge", str(recipe), "other"]) == 0
    _same("other", merge.patches(BASE, LOW_RANK, weights=[1, 2], rank=2), rtol=1e-6)


def test_revoked_from_bfloat16(folder):
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    checkpoint.save_params("base", base)
    for i in range(2):
        patch = {"c": patches.Sparse(SPARSE[i]["c"].indices, (base["c"][SPARSE[i]["c"].indices] * 1.01))}
        checkpoint.save_patch(f"h{i}", patch, base=base, precision={"c": PRECISIONS[i]["c"]})
    assert _merge("information", "merged", "h0", "h1") == 0
    assert _merge("information", "left", "--set", "revoke=h1", "--", "merged") == 0
    assert checkpoint.load_patch("left")[0]["c"].indices.tolist() == SPARSE[0]["c"].indices.tolist()


@pytest.mark.parametrize(
    "method, args, code, wrong",
    [
        ("information", ["p0", "none"], 2, "`none` carries no precision of `c`"),
        ("information", ["p0", "l0"], 2, "`l0` carries no precision of `a.w`"),
        ("information", ["p0", "base"], 2, "`base` is no patch"),
        ("information", ["--set", "revoke=p1", "--", "p0"], 2, "never added"),
        ("information", ["--set", "prior=-1", "--", "p0"], 2, "`prior` must be"),
        ("information", ["--set", "revoke=nowhere", "--", "p0"], 2, "nowhere"),
        ("information", ["--set", "revoke=p0", "revoke=p1", "--", "p0"], 2, "--set revoke is given twice"),
        ("information", ["--set", "revoke=3", "--", "p0"], 2, "`revoke` must be"),
        (
            "information",
            ["--weights", "1", "p0"],
            2,
            "`information` has no option `weights`; it has base, revoke",
        ),
        ("patches", ["--set", "rank=0", "--", "l0"], 2, "`rank` must be at least 1"),
        ("patches", ["--set", "rank=x", "--", "l0"], 2, "`rank` must be an integer"),
        ("patches", ["--set", "scales=x", "--", "l0"], 2, "`scales` must be one of"),
        ("patches", ["--dtype", "bfloat16", "l0"], 2, "no option `dtype`"),
        ("patches", ["--dry-run", "l0"], 2, "no --dry-run"),
        ("patches", ["l0", "other"], 4, "`other` is for another base"),
    ],
)
def test_bad_patches(method, args, code, wrong, folder, capsys):
    base = jax.tree.map(lambda x: x + 1, BASE)
    checkpoint.save_patch("other", SPARSE[0], base=base)
    assert _merge(method, "out", *args) == code
    error = capsys.readouterr().err
    assert wrong in error and error.count("\n") == 1
    assert not list(folder.glob("out*"))


def test_other_bad_arguments(folder, capsys):
    assert cli.main(["merge", "--method", "patches", "--out", "out", "l0"]) == 2
    assert "`base` must be given" in capsys.readouterr().err
    for out in ("l0", "base"):
        assert _merge("patches", out, "l0") == 2
        assert "is an input" in capsys.readouterr().err
    assert _merge("patches", "none", "l0") == 2 and "exists" in capsys.readouterr().err
    assert cli.main(["merge", "--methods"]) == 0
    assert "information base=required revoke=None" in capsys.readouterr().out
