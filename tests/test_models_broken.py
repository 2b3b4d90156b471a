"""Broken folders through the command line: the exit code, one line of error, and no network."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from fishjax import checkpoint, cli

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


def missing_tensor(folder):
    params = checkpoint.load_params(folder)
    del params["model"]["norm"]
    (folder / "model.safetensors").unlink()
    checkpoint.save_params(folder, params)


def pickled(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01.")


def sharded(folder):
    params = checkpoint.load_params(folder)
    (folder / "model.safetensors").unlink()
    checkpoint.save_params(folder, params, shard_bytes=20_000)


def lying_index(folder):
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    homes = index["weight_map"]
    homes["model.norm.weight"] = next(f for f in homes.values() if f != homes["model.norm.weight"])
    path.write_text(json.dumps(index))


def missing_shard(folder):
    sharded(folder)
    min(folder.glob("model-*.safetensors")).unlink()


def unknown_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "mamba"}')


COMMANDS = {
    "generate": ["generate", "--model", "m", "--ids", "3 1 4"],
    "fisher": ["fisher", "--model", "m", "--data", "rows.jsonl", "--out", "f"],
    "inspect": ["inspect", "m"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "damage, code, said",
    [
        (missing_tensor, 4, "missing: `model.norm.weight`"),
        (pickled, 3, "pickle"),
        (lying_index, 3, "places `model.norm.weight` in"),
        (unknown_architecture, 2, "got `mamba`"),
        (missing_shard, 2, "is missing"),
    ],
)
def test_exit_codes(damage, code, said, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "llama", "m")
    pathlib.Path("rows.jsonl").write_text('{"input_ids": [3, 1, 4]}')
    damage(pathlib.Path("m"))
    got = cli.main(COMMANDS[command])
    shown = capsys.readouterr()
    if command == "inspect" and damage in (missing_tensor, unknown_architecture):
        # What is there is shown, whatever the configuration makes of it.
        assert got == 0 and f"family: {'llama' if damage is missing_tensor else 'mamba'}" in shown.out
        return
    assert (got, shown.out) == (code, "")
    assert said in shown.err and len(shown.err.splitlines()) == 1 and not pathlib.Path("f").exists()


NO_NETWORK = """
import importlib, json, pkgutil, socket, sys

calls = []

def refuse(*args, **kwargs):
    calls.append(args[-1])
    raise OSError("no network")

socket.getaddrinfo = socket.gethostbyname = refuse
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
import fishjax
for room in pkgutil.iter_modules(fishjax.__path__):
    if room.name != "__main__":
        importlib.import_module(f"fishjax.{room.name}")
from fishjax import models
models.load(sys.argv[1] + "/gpt2")
model = models.build(json.load(open(sys.argv[1] + "/t5_v1_0/config.json")) | {"vocab_size": 600})
models.load_tokenizer(sys.argv[1] + "/spiece", model)
assert not calls, calls
"""


def test_nothing_reaches_for_the_network():
    env = {n: x for n, x in os.environ.items() if "OFFLINE" not in n}
    env["PYTHONPATH"] = str(pathlib.Path(cli.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(FIXTURES)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
