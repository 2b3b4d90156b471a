"""What merging files takes: bounded memory, and a dry run that tells what is read, written and held."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import fishjax
from fishjax import checkpoint, merge, patches
from tests import merge_world
from tests.merge_world import write_big as _write_big


@pytest.fixture
def world(tmp_path):
    return functools.partial(merge_world.make, tmp_path)


BIG = """
import sys, numpy as np
from fishjax import merge
before = 'jax' in sys.modules
print(merge.files(*sys.argv[1:2], sys.argv[2:4], sys.argv[4], **eval(sys.argv[5])))
assert not before and 'jax' not in sys.modules
with open('/proc/self/status') as f:
    print([int(l.split()[1]) for l in f if l.startswith('VmHWM')][0] // 1024)
"""


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
