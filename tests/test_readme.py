"""The README tells the truth: its Python runs, its commands exist, its numbers are those of RESULTS."""

import pathlib
import re
import shlex
import shutil
import subprocess

import jax
import pytest

from fishjax import cli

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_runs_and_its_patch_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["nnx_losses"][-1] < names["nnx_losses"][0] and names["model"](names["batch"]["x"]).shape == (
        64,
        5,
    )
    assert cli.main(["inspect", "patch.safetensors"]) == 0


def commands():
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "fishjax":
                yield words[1:]


def test_there_are_commands_to_check():
    assert len(list(commands())) >= 5


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: words[0])
def test_commands_are_spelled_as_the_parser_knows_them(words):
    cli._parser().parse_args(words)


def test_the_make_targets_exist():
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        subprocess.run([make, "-n", target], cwd=ROOT, check=True, capture_output=True)
