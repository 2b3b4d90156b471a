"""Merging files that stops, fails or is refused: it goes on from there, and leaves others alone."""

import functools
import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from fishjax import checkpoint, errors, merge
from fishjax.merge import _output, _plan
from fishjax.merge._statistics import GRAIN
from tests import merge_world
from tests.merge_world import write_big as _write_big


@pytest.fixture
def world(tmp_path):
    return functools.partial(merge_world.make, tmp_path)


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


def test_what_was_cut_otherwise_does_not_resume(tmp_path, monkeypatch):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, path in enumerate(paths):
        _write_big(path, i, 4 << 20)
    want = merge.files("average", paths, tmp_path / "want.safetensors")
    run = lambda: merge.files("average", paths, tmp_path / "out.safetensors", block=GRAIN, threads=1)
    with monkeypatch.context() as other:
        other.setattr(_output, "SECONDS", 0.0)
        other.setattr(_plan.Job, "entries", lambda self, block: block // 2)
        real = _output.Output.done

        def done(self, pieces, **state):
            real(self, pieces, **state)
            if pieces == 20:
                raise KeyboardInterrupt

        other.setattr(_output.Output, "done", done)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert run() == want


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
