"""The launch recipes are well-formed, and their flags are those of `fishjax train`."""

import argparse
import pathlib
import re
import subprocess

import pytest
import yaml

from fishjax.cli import _train

RECIPES = sorted((pathlib.Path(__file__).parent.parent / "experiments" / "launch").iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_calls_train_with_flags_that_it_has(path):
    text = path.read_text()
    if path.suffix == ".yaml":
        pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        (command,) = pod["containers"][0]["args"]
        assert command.startswith("exec fishjax train --coordinator")
    else:
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
        command = text
    parser = argparse.ArgumentParser()
    _train.add_arguments(parser)
    used = set(re.findall(r"--\w[\w-]*", command[command.rindex("fishjax train") :]))
    assert {"--coordinator", "--gin_file"} <= used <= set(parser._option_string_actions), used
    for name in re.findall(r"configs/\S+\.gin", command):
        assert (path.parent.parent.parent / name).is_file()
