"""SIGKILL in the middle of a command, a merge or a training, and a rerun that ends in the same bytes."""

import json
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
# The same at every call of those and the engine's own, in a fork each: what is imported stays so.
MERGING = """
import hashlib, json, os, pathlib, signal, sys
from fishjax import checkpoint, merge
from fishjax.merge import _output
_output.SECONDS = 0.0  # every piece is noted
_output.Output.__init__.__kwdefaults__["shard_bytes"] = 20_000  # two tensors a file
out, (method, inputs, options) = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
calls = ["write", "pwrite", "fsync", "replace", "mkdir", "unlink", "rmdir"]
real = {name: getattr(os, name) for name in calls} | {"fsync": lambda fd: None}  # no power is cut here
left = 0
def dying(name):
    def run(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **options)
    return run
def fork(after):
    global left
    ends, end = os.pipe()
    if not os.fork():
        left = after
        for name in calls:
            setattr(os, name, dying(name))
        merge.files(method, inputs, out, **options)
        real["write"](end, str(after - left).encode())
        os._exit(0)
    os.close(end)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    said = os.read(ends, 100)
    os.close(ends)
    return code, said
def content():
    files = [out] if out.is_file() else sorted(out.iterdir()) if out.exists() else []
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
def remove():
    for p in [out] if out.is_file() else [*out.iterdir(), out]:
        p.unlink() if p.is_file() else p.rmdir()
partial = out.with_name(out.name + ".partial")
code, total = fork(0)
want = content()
remove()
assert code == 0 and not partial.exists()
seen = {"all": int(total), "resumed": 0, "files": sorted(want)}
for n in range(1, int(total) + 1):
    code, _ = fork(n)
    assert code == -signal.SIGKILL, (n, code)
    if out.exists():
        assert content() == want, (n, "half-written")
        remove()
    seen["resumed"] += (partial / "journal.json").exists()
    code, _ = fork(0)
    assert code == 0 and content() == want and not partial.exists(), (n, content())
    remove()
assert "jax" not in sys.modules
print(json.dumps(seen))
"""
# It kills itself during its n-th save of a training's state.
SAVING = """
import os, signal, sys
during_save = int(sys.argv[1])
if during_save:
    import orbax.checkpoint as ocp
    whole, saves = ocp.StandardCheckpointer.save, []
    def save(self, *args, **options):
        saves.append(1)
        whole(self, *args, **options)
        if len(saves) == during_save:
            os.kill(os.getpid(), signal.SIGKILL)  # written in the background: somewhere in the middle
    ocp.StandardCheckpointer.save = save
"""
TRAINING = (
    SAVING
    + """
import jax, jax.numpy as jnp, optax
from fishjax import checkpoint, masks, patches, train
base = {"w": jnp.arange(12.0).reshape(4, 3)}
loss = lambda params, example: ((example["x"] @ params["w"]) ** 2).sum()
batches = ({"x": jax.random.normal(jax.random.key(i), (2, 4))} for i in range(20))
optimizer = optax.adam(0.1)
patch = patches.init_sparse(base, masks.topk(base, density=0.5))
state, _ = train.fit(train.init(patch, optimizer), train.make_step(loss, optimizer), base, batches,
                     steps=20, folder="state", every=4)
print(checkpoint.save_patch("p", train.patch_of(state), base=base))
"""
)
COMMAND = SAVING + "from fishjax import cli; sys.exit(cli.main(sys.argv[2:]))"


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
    checkpoint.save_fisher(folder / "fisher", {n: x * x for n, x in tuned.items()}, metadata={})
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
    assert set(os.listdir(tmp_path)) == {"out"} | ({"f"} if command == "mask" else set())


@pytest.mark.parametrize(
    "out, method, inputs, options",
    [
        ("out", "slerp", ["tuned", "base"], {"t": 0.3}),
        ("out.safetensors", "ties", ["patch", "tuned"], {"density": 0.3, "scope": "global", "base": "base"}),
        (
            "out.safetensors",
            "fisher",
            ["tuned", "base"],
            {"normalize": True, "fishers": ["fisher", "fisher"]},
        ),
    ],
)
def test_a_merge_killed_at_any_call_ends_in_the_same_bytes(tmp_path, models, out, method, inputs, options):
    (models / "base" / "config.json").write_text("{}")
    at = lambda x: [at(v) for v in x] if isinstance(x, list) else str(models / x)
    options = {k: at(v) if k in ("base", "fishers") else v for k, v in options.items()}
    done = run(MERGING, out, json.dumps([method, at(inputs), options]), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["all"] > 20 and seen["resumed"] > 10
    if out == "out":
        assert {"README.md", "config.json", "model.safetensors.index.json"} < set(seen["files"])
    assert os.listdir(tmp_path) == []


def test_a_killed_training_goes_on_to_the_same_patch(tmp_path):
    (tmp_path / "straight").mkdir()
    straight = run(TRAINING, 0, folder=tmp_path / "straight")
    assert straight.stdout.startswith("sha256:"), straight.stderr
    assert run(TRAINING, 2, folder=tmp_path).returncode == -signal.SIGKILL
    again = run(TRAINING, 0, folder=tmp_path)
    assert again.stdout == straight.stdout, again.stderr
    assert (tmp_path / "p").read_bytes() == (tmp_path / "straight" / "p").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [None, 600])
def test_a_killed_fishjax_train_goes_on_to_the_same_patch(tmp_path, refresh):
    pytest.importorskip("gin")
    pytest.importorskip("tensorflow_datasets")
    import jax

    from fishjax import models

    config = {"model_type": "fishjax_digits", "num_hidden_layers": 1, "hidden_size": 8}
    model = models.build({**config, "intermediate_size": 16})
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))

    def train(out, during_save):
        lines = ['MODEL = "model"', 'DATA = "bundled_digits"', f'OUT = "{out}"', "STEPS = 1100"]
        lines += ["contribute.fish.density = 0.05", f"contribute.run.refresh_every = {refresh}"]
        words = [word for line in lines for word in ("--gin_bindings", line)]
        gin_file = f"{ROOT}/configs/train_fish.gin"
        return run(COMMAND, during_save, "train", "--gin_file", gin_file, *words, folder=tmp_path)

    straight = train("straight", 0)
    assert straight.returncode == 0, straight.stderr
    assert train("killed", 2).returncode == -signal.SIGKILL
    assert (tmp_path / "killed.partial").is_dir() and not (tmp_path / "killed").exists()
    again = train("killed", 0)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "straight").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name or "tmp" in name]
