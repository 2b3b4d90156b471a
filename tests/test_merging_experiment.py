"""The merging experiments at toy size, through their own gin file."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("gin")
pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).parent.parent
TOY = [
    "merging.run.seeds = (0,)",
    'merging.run.config = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}',
    "BASE_STEPS = 20",
    "STEPS = 10",
    "merging.ensemble.members = 2",
    "merging.several.tasks = [@mirrored/lab.Task(), @inverted/lab.Task()]",
    "merging.several.scales = (1.0,)",
    "merging.several.densities = (0.5,)",
    "merging.several.floors = (1e-6,)",
    "merging.several.alphas = (0.9,)",
]


@pytest.mark.slow
def test_the_experiments_run_report_and_go_on(tmp_path):
    def play():
        bindings = [x for b in [*TOY, f'merging.run.out = "{tmp_path}/out"'] for x in ("--gin_bindings", b)]
        command = [
            sys.executable,
            "-m",
            "experiments.merging",
            "--gin_file",
            "configs/merging.gin",
            *bindings,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((tmp_path / "out/results.json").read_text())

    results = play()
    (several,) = results["several"]
    assert len(several["table"]) >= 12 and all(len(row) == 2 for row in several["table"].values())
    curves = results["robust"][0]["curves"]
    for where in ("in distribution", "shifted"):  # both paths end in the same two models
        assert curves["average"][where][0] == curves["Fisher"][where][0]
        assert curves["average"][where][-1] == curves["Fisher"][where][-1]
    assert {p.suffix for p in (tmp_path / "out/plots").iterdir()} == {".png", ".svg"}

    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/cells").iterdir()}
    assert play() == results and kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "out/cells").iterdir()}
