"""SIGKILL in the middle of `diff`, `apply` and a training, and a rerun that ends in the same bytes."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import fishjax
from fishjax import checkpoint

ROOT = str(pathlib.Path(fishjax.__file__).parents[1])
# The process kills itself at its n-th call of write, fsync or replace: no handler, no clean-up.
DYING = """
import os, signal, sys
left = int(sys.argv[1])
def dying(call):
    def run(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return run
for name in ("write", "fsync", "replace"):
    setattr(os, name, dying(getattr(os, name)))
from fishjax import cli
code = cli.main(sys.argv[2:])
print("calls", int(sys.argv[1]) - left)
sys.exit(code)
"""
TRAINING = """
import os, signal, sys
import jax, jax.numpy as jnp, optax
from fishjax import checkpoint, masks, patches, train
during_save = int(sys.argv[1])
base = {"w": jnp.arange(12.0).reshape(4, 3)}
loss = lambda params, example: ((example["x"] @ params["w"]) ** 2).sum()
batches = ({"x": jax.random.normal(jax.random.key(i), (2, 4))} for i in range(20))
if during_save:
    import orbax.checkpoint as ocp
    whole, saves = ocp.StandardCheckpointer.save, []
    def save(self, *args, **options):
        saves.append(1)
        whole(self, *args, **options)
        if len(saves) == during_save:
            os.kill(os.getpid(), signal.SIGKILL)  # written in the background: somewhere in the middle
    ocp.StandardCheckpointer.save = save
optimizer = optax.adam(0.1)
patch = patches.init_sparse(base, masks.topk(base, density=0.5))
state, _ = train.fit(train.init(patch, optimizer), train.make_step(loss, optimizer), base, batches,
                     steps=20, folder="state", every=4)
print(checkpoint.save_patch("p", train.patch_of(state), base=base))
"""


def run(script, *args, folder):
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base = {f"t{i}": rng.normal(size=(50, 40)).astype(np.float32) for i in range(4)}
    tuned = {n: np.where(rng.random(x.shape) < 0.05, x + 1, x) for n, x in base.items()}
    checkpoint.save_params(folder / "base", base)
    checkpoint.save_params(folder / "tuned", tuned)
    checkpoint.diff_files(folder / "base", folder / "tuned", folder / "patch")
    return folder


@pytest.mark.parametrize("command", ["diff", "apply", "mask"])
def test_a_killed_command_leaves_nothing_half_written_and_can_be_run_again(tmp_path, models, command):
    if command == "mask":
        checkpoint.save_fisher(tmp_path / "f", {"w": np.arange(5000.0)}, metadata={})
    args = {
        "diff": ["diff", models / "base", models / "tuned", "--out", "out"],
        "apply": ["apply", models / "patch", "--base", models / "base", "--out", "out"],
        "mask": ["mask", "--fisher", "f", "--density", "0.1", "--out", "out"],
    }[command]
    out = tmp_path / "out"

    def content():
        return {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else out.read_bytes()

    def remove():
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    calls = int(run(DYING, 0, *args, folder=tmp_path).stdout.split()[-1])
    want = content()
    assert calls >= 4
    for n in sorted({1, 2, calls // 2, calls - 1}):
        remove()
        assert run(DYING, n, *args, folder=tmp_path).returncode == -signal.SIGKILL
        assert not out.exists() or content() == want
    remove()
    assert run(DYING, 0, *args, folder=tmp_path).returncode == 0
    assert content() == want


def test_a_killed_training_goes_on_to_the_same_patch(tmp_path):
    (tmp_path / "straight").mkdir()
    straight = run(TRAINING, 0, folder=tmp_path / "straight")
    assert straight.stdout.startswith("sha256:"), straight.stderr
    assert run(TRAINING, 2, folder=tmp_path).returncode == -signal.SIGKILL
    again = run(TRAINING, 0, folder=tmp_path)
    assert again.stdout == straight.stdout, again.stderr
    assert (tmp_path / "p").read_bytes() == (tmp_path / "straight" / "p").read_bytes()
