"""Patch files among the models of a merge: folded as they are read, known by their digests, resumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, errors, merge, patches, strict_yaml, tree
from fishjax.checkpoint import _kinds
from fishjax.checkpoint._kinds import Change
from fishjax.checkpoint._manifest import write_sealed
from fishjax.merge import _output
from fishjax.merge._statistics import GRAIN

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
some = lambda n, size: np.sort(RNG.choice(size, n, replace=False)).astype(np.int32)
powers = lambda n: np.float32(2.0) ** RNG.integers(-9, 0, n).astype(np.float32)
codes = lambda n: RNG.integers(-127, 128, n).astype(np.int8)
CHANGES = {  # a leaf's shape, and an entry for it
    "dense": ((5, 7), Change("dense", {"values": normal(5, 7)}, {})),
    "dense vector": ((9,), Change("dense", {"values": normal(9)}, {})),
    "one row": ((1, 9), Change("dense", {"values": normal(1, 9)}, {})),
    "sparse": ((4, 3, 5), Change("sparse", {"indices": some(20, 60), "values": normal(20)}, {})),
    "low rank": ((6, 8), Change("low_rank", {"a": normal(6, 1, 2), "b": normal(1, 8, 2)}, {"scale": 0.5})),
    "low rank kernel": (
        (4, 3, 5),
        Change("low_rank", {"a": normal(4, 1, 5, 3), "b": normal(1, 3, 1, 3)}, {"scale": 2.0}),
    ),
    "scale": ((6, 8), Change("scale", {"vector": normal(1, 8)}, {})),
    "scale of rows": ((4, 3, 5), Change("scale", {"vector": normal(4, 1, 1)}, {})),
    "fused scale": ((12, 5), Change("scale", {"vector": normal(8, 1)}, {"fused": (0, 3, 1, 2)})),
    "delta": ((5, 7), Change("delta", {"codes": codes(35), "scales": powers(9)}, {"block": 4})),
    "sparse delta": (
        (5, 7),
        Change("delta", {"indices": some(11, 35), "codes": codes(11), "scales": powers(3)}, {"block": 4}),
    ),
}


def test_every_kind_is_here():
    assert {change.kind for _, change in CHANGES.values()} == set(patches.KINDS)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHANGES)
def test_rows_are_those_of_the_whole(case, dtype):
    shape, change = CHANGES[case]
    weight = normal(*shape).astype(dtype)
    count, width = (shape[0], ()) if len(shape) == 1 else (weight.size // shape[-1], shape[-1:])
    want = _kinds.fold("w", change, "w", weight).reshape(count, *width)
    for first in range(count):
        for last in range(first + 1, count + 1):
            cut = _kinds.rows("w", change, "w", shape, first, last)
            got = _kinds.fold("w", cut, "w", weight.reshape(count, *width)[first:last])
            np.testing.assert_array_equal(got, want[first:last])


def test_rows_of_a_tied_leaf():
    change = Change("scale", {"vector": normal(8, 1)}, {"tied": (("b", (8,)),)})
    whole = _kinds.fold("w", change, "b", np.ones(8, np.float32))
    got = _kinds.fold("b", _kinds.rows("w", change, "b", (8,), 3, 5), "b", np.ones(2, np.float32))
    np.testing.assert_array_equal(got, whole[3:5])


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base and three patches of it, over leaves of several blocks; the files in the working directory."""
    monkeypatch.chdir(tmp_path)
    shapes = {"a.w": (300, 700), "a.b": (700,), "c": (2 * GRAIN + 5,), "d": (3, 70, 500), "e": ()}
    base = {n: normal(*s) for n, s in shapes.items()}
    contributions = [
        {"a.w": patches.LowRank(normal(300, 1, 2), normal(1, 700, 2), 0.5), "e": patches.Dense(normal())},
        {
            "a.w": patches.Scale(1 + normal(1, 700), (("a.b", (700,)),)),
            "d": patches.Sparse(some(999, 105_000), normal(999)),
        },
        {"c": patches.Dense(normal(2 * GRAIN + 5)), "d": patches.Dense(normal(3, 70, 500))},
    ]
    checkpoint.save_params("base.safetensors", tree.nest(base))
    for i, patch in enumerate(contributions):
        checkpoint.save_patch(f"p{i}", patch, base=base)
    return base, contributions


PATHS = ["p0", "p1", "p2"]


def folded(base, patch):
    """Return what a patch makes of a base, kind by kind and leaf by leaf on the host."""
    changed = checkpoint.read_patch(patch).changes.items()
    return base | {
        t: _kinds.fold(n, change, t, base[t]) for n, change in changed for t in _kinds.touched(n, change)
    }


@pytest.mark.parametrize("method, options", [("average", {"weights": [1, 2, 4]}), ("ties", {"density": 0.3})])
def test_streamed_patches_give_what_their_models_give(method, options, world):
    base, contributions = world
    models = [folded(base, p) for p in PATHS]
    for model, patch in zip(models, contributions, strict=True):
        applied = patches.apply(jax.tree.map(jnp.asarray, base), patch)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), model, applied)
    more = {"base": base} if method == "ties" else {}
    want = getattr(merge, method)(models, **more, **options)
    for i, (block, threads) in enumerate([(GRAIN, 2), (3 * GRAIN, 1)]):
        out = f"out{i}.safetensors"
        merge.files(method, PATHS, out, base="base.safetensors", block=block, threads=threads, **options)
        jax.tree.map(np.testing.assert_array_equal, tree.flatten(checkpoint.load_params(out)), want)


def test_no_more_than_a_block_is_folded_at_a_time(world, monkeypatch):
    sizes, real = [], _kinds.fold

    def fold(name, change, target, weight):
        sizes.append(weight.size)
        return real(name, change, target, weight)

    monkeypatch.setattr(_kinds, "fold", fold)
    merge.files("average", PATHS, "out.safetensors", base="base.safetensors", block=GRAIN)
    assert len(sizes) == 17  # blocks of patched leaves
    assert max(sizes) < GRAIN + 2 * 700  # and a row at each end


def interrupt(monkeypatch, after):
    """Stop the next merge at its n-th write, as if by Ctrl-C; what it has done is noted at once."""
    calls, real = [], _output.Output.write

    def write(self, name, start, values):
        calls.append(name)
        if len(calls) == after:
            raise KeyboardInterrupt
        real(self, name, start, values)

    monkeypatch.setattr(_output, "SECONDS", 0.0)
    monkeypatch.setattr(_output.Output, "write", write)
    return calls


def test_a_merge_of_patches_is_resumed(world, tmp_path, monkeypatch):
    run = lambda out: merge.files("average", PATHS, out, base="base.safetensors", block=GRAIN, threads=1)
    want = run("want.safetensors")
    calls = interrupt(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run("out.safetensors")
    before = len(calls)
    (tmp_path / "p1").touch()  # a patch is what its digest says, whatever its file's age
    done = json.loads((tmp_path / "out.safetensors.partial/journal.json").read_text())["pieces"]
    assert 2 <= done < 6 and run("out.safetensors") == want
    assert len(calls) - before == 11 - done  # pieces of the output


def test_another_patch_does_not_resume(world, tmp_path, monkeypatch):
    base, _ = world
    run = lambda out: merge.files("average", PATHS, out, base="base.safetensors", block=GRAIN, threads=1)
    interrupt(monkeypatch, 10)  # after all of `c`
    with pytest.raises(KeyboardInterrupt):
        run("out.safetensors")
    other = {n: patches.Dense(normal(*base[n].shape)) for n in ("c", "d")}  # the same leaves
    checkpoint.save_patch("p2", other, base=base)
    assert run("out.safetensors") == run("want.safetensors")


def test_the_card_names_patches_and_their_base_by_their_digests(world, tmp_path):
    base, _ = world
    merge.files("average", PATHS, "out", base="base.safetensors")
    record = strict_yaml.load(tmp_path / "out/fishjax_merge.yaml", "the record")
    assert record["inputs"] == {
        **{p: checkpoint.read_patch(p).digest for p in PATHS},
        "base.safetensors": checkpoint.digest(base),
    }
    _, head, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert head.startswith("base_model:\n- base.safetensors\nbase_model_relation")  # a patch is no model
    assert all(f"| `{p}` |" in text for p in [*PATHS, "base.safetensors"])


def test_a_patch_that_does_not_fit_is_refused_before_anything_is_written(world, tmp_path):
    base, _ = world
    checkpoint.save_params("other.safetensors", base | {"c": base["c"] + 1})
    checkpoint.save_params("short.safetensors", base | {"c": base["c"][:9]})
    (tmp_path / "broken").write_bytes((tmp_path / "p2").read_bytes()[:-1] + b"x")
    odd = {"touched": {}, "changes": {"c": {"indices": {"count": "9"}}}}
    write_sealed("odd", "patch", odd, {})
    write_sealed("later", "patch", {"version": 2}, {})
    for inputs, other, error, wrong in (
        (["p2"], None, errors.UsageError, "`p2` is a patch; give the `base`"),
        (["p2"], "other", errors.WrongBaseError, "`p2` is for another base: `c` .* has other values"),
        (["p2"], "short", errors.WrongBaseError, r"`c` is float32\[9\], wanted float32\[131077\]"),
        (["broken"], "base", errors.FileFormatError, "`broken` is corrupt"),
        (["odd"], "base", errors.FileFormatError, "`odd`: `count` of the manifest must be of type int"),
        (["later"], "base", errors.FileFormatError, "`later` has a manifest of version 2"),
    ):
        near = other and f"{other}.safetensors"
        with pytest.raises(error, match=wrong):
            merge.files("average", inputs, "out", base=near)
    assert not list(tmp_path.glob("out*"))
    # Of another base only what a patch changes must agree.
    merge.files("average", ["p0", "p0"], "out.safetensors", base="other.safetensors", digests=False)
    got = checkpoint.load_params("out.safetensors")["c"]
    np.testing.assert_array_equal(got, base["c"] + 1)
