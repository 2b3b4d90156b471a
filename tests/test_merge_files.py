"""Merging files: the same bits as in memory, whatever the cut; resumed, bounded, and safe to fail."""

import inspect
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishjax
from fishjax import checkpoint, errors, merge, patches, tree
from fishjax.merge import _output
from fishjax.merge._select import Ranking
from fishjax.merge._statistics import GRAIN

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
SHAPES = {"a.weight": (500, 700), "a.bias": (700,), "b.one": (1,), "b.scalar": (), "b.none": (0, 3)}


def _params(seed, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    flat = {n: (scale * rng.standard_normal(s)).astype(dtype) for n, s in SHAPES.items()}
    return tree.nest({n: np.asarray(x, dtype) for n, x in flat.items()} | {"ids": np.arange(5)})


def _add(a, b):
    return jax.tree.map(lambda x, y: x if x.dtype.kind == "i" else (x + y).astype(x.dtype), a, b)


@pytest.fixture
def world(tmp_path):
    """Two models, their base, and Fishers: in memory, and as files."""

    def make(dtype=np.float32):
        base = _params(0, dtype)
        models = [_add(base, _params(i, dtype, 0.1)) for i in (1, 2)]
        fishers = [jax.tree.map(lambda x: abs(x).astype(np.float32), _params(i)) for i in (3, 4, 5)]
        paths = {}
        for name, params in {
            "base": base,
            "m0": models[0],
            "m1": models[1],
            "f0": fishers[0],
            "f1": fishers[1],
            "f2": fishers[2],
        }.items():
            paths[name] = tmp_path / f"{name}.safetensors"
            checkpoint.save_params(paths[name], params)
        return {"models": models, "base": base, "fishers": fishers[:2], "base_fisher": fishers[2]}, {
            "models": [paths["m0"], paths["m1"]],
            "base": paths["base"],
            "fishers": [paths["f0"], paths["f1"]],
            "base_fisher": paths["f2"],
        }

    return make


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda rng: abs(rng.standard_normal(30_000)),
        lambda rng: abs(
            rng.standard_normal(30_000).astype(jnp.bfloat16).astype(float)
        ),  # few values, many ties
        lambda rng: np.where(rng.random(30_000) < 0.9, 0, 1.0),
        lambda rng: np.sort(rng.random(30_000)),  # a sample of each block's beginning misleads
        lambda rng: np.full(30_000, np.inf),
    ],
)
def test_ranking_is_exact(make, dtype):
    x = make(np.random.default_rng(0)).astype(dtype)
    blocks = np.split(x, 10)
    ks = [0, 1, 2, 57, 15_000, 29_999, 30_000]
    for sample in (x[:500], x[-500:], np.concatenate([b[:50] for b in blocks])):
        ranking = Ranking([ks, ks[:1]])
        ranking.guess([sample, sample], x.size)
        passes = 0
        while not ranking.done:
            for b in blocks:
                ranking.add(ranking.count([b, b]))
            ranking.narrow()
            passes += 1
        ordered = np.sort(x)[::-1]
        assert ranking.values() == [[np.inf if k == 0 else ordered[k - 1] for k in ks], [np.inf]]
        assert passes <= (6 if dtype == np.float64 else 4)


def test_a_guess_is_not_an_answer():
    x = np.concatenate([np.zeros(1000), np.ones(50)]).astype(np.float32)
    ranking = Ranking([[50]])
    ranking.guess([x[:1000]], x.size)  # nothing but zeros: the first span is one pattern, the wrong one
    while not ranking.done:
        ranking.add(ranking.count([x]))
        ranking.narrow()
    assert ranking.values() == [[1.0]]


BIG = """
import sys, numpy as np
from fishjax import merge
before = 'jax' in sys.modules
print(merge.files(*sys.argv[1:2], sys.argv[2:4], sys.argv[4], **eval(sys.argv[5])))
assert not before and 'jax' not in sys.modules
with open('/proc/self/status') as f:
    print([int(l.split()[1]) for l in f if l.startswith('VmHWM')][0] // 1024)
"""


def _write_big(path, seed, entries):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(1 << 20).astype(np.float32)
    checkpoint.save_params(
        path, {f"t{i}": np.roll(values, i).reshape(1024, 1024) for i in range(entries >> 20)}
    )


def _run(*args):
    return subprocess.Popen(
        [sys.executable, "-c", BIG, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Two models of 160 MB each."""
    folder = tmp_path_factory.mktemp("big")
    for i, name in enumerate("ab"):
        _write_big(folder / f"{name}.safetensors", i, 40 << 20)
    return [folder / "a.safetensors", folder / "b.safetensors"]


@pytest.mark.parametrize(
    "method, options", [("average", {}), ("slerp", {"t": 0.4}), ("ties", {"density": 0.2})]
)
def test_memory_is_bounded_and_jax_is_not_imported(method, options, big, tmp_path):
    if method == "ties":
        options = options | {"base": str(big[0])}
    done = _run(method, *big, tmp_path / "out.safetensors", options)
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert int(out.split()[1]) < 150  # MB: the interpreter with numpy is 40 to 60


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, path in enumerate(paths):
        _write_big(path, i, 4 << 20)
    want = merge.files("average", paths, tmp_path / "want.safetensors")
    monkeypatch.setattr(_output, "SECONDS", 0.0)
    written, real = [], _output.Output.write

    def write(self, name, start, values):
        if len(written) in (20, 45):
            written.append(None)
            raise KeyboardInterrupt
        written.append((name, start))
        real(self, name, start, values)

    monkeypatch.setattr(_output.Output, "write", write)
    run = lambda: merge.files("average", paths, tmp_path / "out.safetensors", block=GRAIN, threads=1)
    journal = tmp_path / "out.safetensors.partial" / "journal.json"
    done = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
        done.append(json.loads(journal.read_text())["pieces"])
    assert 10 <= done[0] <= 20 and done[0] + 10 <= done[1] <= 45
    before = len(written)
    assert run() == want
    assert len(written) - before == 64 - done[1]  # 4 tensors of 16 pieces


def test_another_recipe_does_not_resume(world, tmp_path):
    _, paths = world()
    partial = tmp_path / "out.safetensors.partial"
    (partial / "model").mkdir(parents=True)
    (partial / _output.LOCK).touch()
    (partial / "journal.json").write_text('{"key": "other", "pieces": 99}')
    merge.files("average", paths["models"], tmp_path / "out.safetensors")
    got, want = (
        checkpoint.load_params(tmp_path / "out.safetensors"),
        merge.average([checkpoint.load_params(p) for p in paths["models"]]),
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("found", ["model", "notes", "file", "link"])
def test_what_is_not_ours_is_not_removed(found, world, tmp_path):
    trees, paths = world()
    partial, notes = tmp_path / "out.partial", tmp_path / "elsewhere"
    if found == "model":
        checkpoint.save_params(partial, trees["models"][0])
    elif found == "file":
        partial.write_text("mine")
    else:
        notes.mkdir()
        (notes / "journal.json").write_text("{}")
        partial.symlink_to(notes) if found == "link" else notes.rename(partial)
    inputs = [paths["models"][0], partial if found == "model" else paths["models"][1]]
    wrong = "is an input" if found == "model" else "not what an unfinished merge left"
    for run in (merge.files, lambda *args: merge.estimate(*args[:2], out=args[2])):
        with pytest.raises(errors.UsageError, match=wrong):
            run("average", inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert partial.read_text() == "mine" if found == "file" else len(list(partial.iterdir())) == 1


def test_two_merges_do_not_write_one_output(world, tmp_path):
    _, paths = world()
    out = tmp_path / "out.safetensors"
    seen, real = [], _output.Output.write

    def write(self, *args):
        if not seen:  # in the middle of the first, the second begins
            seen.append(None)
            with pytest.raises(
                errors.UsageError, match=r"another merge is writing to `.*out.safetensors.partial`"
            ):
                merge.files("average", paths["models"], out, weights=[1, 2])
            seen.append(None)
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_output.Output, "write", write)
        digest = merge.files("average", paths["models"], out, threads=1)
    assert len(seen) == 2 and checkpoint.digest(checkpoint.load_params(out)) == digest
    assert list(tmp_path.glob("out*")) == [out]


def test_a_full_disk_leaves_nothing(world, tmp_path):
    _, paths = world()
    code = """
import resource, signal, sys
from fishjax import merge
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
merge.files("average", sys.argv[1:3], sys.argv[3])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths["models"]), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
    )
    assert "OSError" in done.stderr
    assert not list(tmp_path.glob("out*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_disk_that_fails_in_the_middle_leaves_nothing(world, tmp_path, monkeypatch):
    _, paths = world()
    real, calls = os.pwrite, []

    def fails(fd, data, offset):
        calls.append(offset)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
        merge.files("average", paths["models"], tmp_path / "out", block=GRAIN)
    assert not list(tmp_path.glob("out*"))


def test_bad_input_is_refused_before_anything_is_written(world, tmp_path):
    trees, paths = world()
    out = tmp_path / "out.safetensors"
    models = paths["models"]
    with pytest.raises(
        errors.UsageError, match=r"`avrage` is no merge method; there are average, breadcrumbs"
    ):
        merge.files("avrage", models, out)
    with pytest.raises(errors.UsageError, match=r"`average` has no option `density`"):
        merge.files("average", models, out, density=0.5)
    with pytest.raises(errors.UsageError, match=r"`ties` needs the option `density`"):
        merge.files("ties", models, out, base=paths["base"])
    with pytest.raises(errors.UsageError, match=r"`base` must be given"):
        merge.files("ties", models, out, density=0.5)
    with pytest.raises(errors.UsageError, match=r"no use for one"):
        merge.files("average", models, out, base=paths["base"])
    with pytest.raises(errors.UsageError, match=r"`fishers` must be given"):
        merge.files("fisher", models, out)
    with pytest.raises(errors.UsageError, match=r"`fishers` must be one for each of the 2 models; got 1"):
        merge.files("fisher", models, out, fishers=paths["fishers"][:1])
    with pytest.raises(errors.UsageError, match="is an input"):
        merge.files("average", models, models[0])
    out.write_bytes(b"mine")
    with pytest.raises(errors.UsageError, match="exists"):
        merge.files("average", models, out)
    with pytest.raises(errors.UsageError, match="exists"):
        merge.estimate("average", models, out=out)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        merge.files("average", models, tmp_path / "nowhere" / "out")
    assert out.read_bytes() == b"mine"
    out.unlink()
    checkpoint.save_params(tmp_path / "c.safetensors", {**trees["base"], "more": np.ones(2)})
    with pytest.raises(errors.StructureError, match=r"only in model 1: `more`"):
        merge.files("average", [models[0], tmp_path / "c.safetensors"], out)
    checkpoint.save_params(tmp_path / "d.safetensors", {**trees["base"], "ids": np.arange(5) + 1})
    with pytest.raises(errors.StructureError, match=r"`ids` is int64.*differs between model 0 and model 1"):
        merge.files("average", [models[0], tmp_path / "d.safetensors"], out)
    bad = jax.tree.map(lambda x: -x, trees["fishers"][0])
    checkpoint.save_params(tmp_path / "e.safetensors", bad)
    with pytest.raises(errors.UsageError, match=r"`fishers` \(number 1\) must be finite and >= 0"):
        merge.files("fisher", models, out, fishers=[paths["fishers"][0], tmp_path / "e.safetensors"])
    huge = jax.tree.map(lambda x: np.full_like(x, 3e38), trees["fishers"][0])  # finite, and their sum is not
    with pytest.raises(errors.UsageError, match=r"`fishers` \(number 0\) .*at most 4\.3e\+37"):
        merge.fisher(trees["models"], fishers=[huge, huge])
    assert not list(tmp_path.glob("out*"))


MEASURED = """
import json, sys
from fishjax import merge
def proc(file, word):
    return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(word))
now = lambda: [proc("io", "rchar"), proc("io", "wchar"), 1024 * proc("status", "VmHWM")]
method, inputs, out, options = json.loads(sys.argv[1])
told, start = merge.estimate(method, inputs, out=out, **options), now()
merge.files(method, inputs, out, **options)
assert "jax" not in sys.modules
print(json.dumps([told, [b - a for a, b in zip(start, now())]]))
"""


def test_a_dry_run_tells_what_is_read_written_and_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    models = [
        {f"w{j}": rng.standard_normal((1024, 1024)).astype(np.float32) for j in range(3)} for _ in range(3)
    ]
    for i, model in enumerate(models):
        checkpoint.save_params(f"m{i}", model)
        checkpoint.save_fisher(f"f{i}", jax.tree.map(abs, model), metadata={})
    (tmp_path / "m0" / "config.json").write_text(" " * 500_000)
    few = np.sort(rng.choice(1 << 20, 50_000, replace=False)).astype(np.int32)
    for i, sign in enumerate((1, -1)):
        change = {"w1": patches.Sparse(few, models[1]["w1"].reshape(-1)[few] + np.float32(sign))}
        checkpoint.save_patch(f"p{i}", change, base=models[0])
    cases = {
        "folders": ("average", ["m1", "m0"], "o1", {}),
        "a file": ("average", ["m0", "m1", "m2"], "o2.safetensors", {}),
        "without digests": ("average", ["m0", "m1"], "o3", {"digests": False}),
        "Fishers": ("fisher", ["m0", "m1"], "o4", {"fishers": ["f0", "f1"], "normalize": True}),
        "sums": ("dare", ["m1", "m2"], "o5", {"base": "m0", "density": 0.3, "rescale": "l1"}),
        "ranks": ("ties", ["m1", "m2"], "o6", {"base": "m0", "density": 0.3, "scope": "tensor"}),
        "patches": ("average", ["p0", "p1"], "o7", {"base": "m0"}),
    }
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(fishjax.__file__).parents[1])}
    for case, arguments in cases.items():
        command = [sys.executable, "-c", MEASURED, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        (read, write, memory), took = json.loads(done.stdout)
        assert took[0] == pytest.approx(read, rel=0.02), case
        assert took[1] == pytest.approx(write, rel=0.02), case
        assert 0.5 * memory < took[2] < 1.3 * memory, case  # less, where threads wait for each other


def test_a_dry_run_writes_nothing(world, tmp_path, monkeypatch):
    trees, paths = world()
    checkpoint.save_patch(
        tmp_path / "p", {"b.one": patches.Dense(np.ones(1, np.float32))}, base=trees["base"]
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.iterdir()]}
    monkeypatch.setattr(os, "pwrite", None)
    cost = merge.estimate("average", [tmp_path / "p", paths["models"][0]], base=paths["base"])
    size = sum(x.nbytes for x in jax.tree.leaves(trees["base"]))
    # The merge reads both models, the digests of output, base and other model the like; the patch is
    # hashed, and so is the leaf that it is for.
    assert cost.read == 5 * size + (tmp_path / "p").stat().st_size + 4 and cost.write == size
    assert {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.iterdir()]} == before
