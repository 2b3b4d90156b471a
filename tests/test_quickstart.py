"""The whole route, as `make quickstart` goes it, with its own gin file."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets")
gin = pytest.importorskip("gin")

ROOT = pathlib.Path(__file__).parent.parent


def play(out, seed):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--gin_file", "configs/quickstart.gin"]
        + ["--gin_bindings", f'OUT = "{out}"', "--gin_bindings", f"SEED = {seed}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_story_is_told_and_told_the_same_twice(tmp_path):
    out = tmp_path / "first"
    results, said = play(out, seed=1)
    worlds = set(results["base"])
    assert worlds == {"new_classes", "rotated"} and results["seed"] == 1

    ada, ben = results["contributors"]
    for who in (ada, ben):
        assert who["accuracy_after"] > who["accuracy_before"] + 0.3
        assert who["bytes"] == (out / "patches" / f"{who['name']}.safetensors").stat().st_size
    assert ada["kind"] == "fish" and ada["density"] == pytest.approx(0.005, abs=1e-5)
    assert ada["bytes"] <= 0.04 * (out / "base" / "model.safetensors").stat().st_size
    assert {b["name"] for b in results["baselines"]} >= {"random mask", "magnitude mask", "full fine-tuning"}

    codes = {v["patch"]: v["exit_code"] for v in results["vet"]}
    assert codes == {"ada": 0, "ben": 0, "poisoned": 1, "other_base": 4, "corrupted": 3}
    mean = lambda scores: sum(scores.values()) / 2
    assert max(mean(m) for m in results["merged"].values()) > mean(results["base"]) + 0.2

    for name in (
        "report.md",
        "config.gin",
        "plots/merge_sweep.png",
        "plots/accuracies.svg",
        "plots/mask_ada.png",
    ):
        assert (out / name).stat().st_size > 100
    assert "merged by fisher" in said and "merged by fisher" in (out / "report.md").read_text()

    again, _ = play(tmp_path / "second", seed=1)
    assert {**results, "seconds": 0} == {**again, "seconds": 0}


PARSE = """
import gin, json, sys
wrong = {}
for path in sys.argv[1:]:
    gin.clear_config()
    try:
        gin.parse_config_file(path, skip_unknown=False)
    except Exception as error:
        wrong[path] = str(error)
print(json.dumps(wrong))
"""


def test_every_gin_file_parses(tmp_path):
    """In one process, that imports once; a file may not lean on the imports of one before it."""
    paths = sorted(map(str, (ROOT / "configs").rglob("*.gin")))
    lines = (ROOT / "configs" / "fish_digits.gin").read_text().splitlines(keepends=True)
    (tmp_path / "wrong.gin").write_text("".join(x for x in lines if not x.startswith("from experiments")))
    command = [sys.executable, "-c", PARSE, *paths, str(tmp_path / "wrong.gin")]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    assert len(paths) > 9 and list(found) == [str(tmp_path / "wrong.gin")], found


def test_a_folder_that_is_no_earlier_run_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(AssertionError, match="not of an earlier run"):
        play(tmp_path, seed=0)
    assert (tmp_path / "mine.txt").read_text() == "precious"
