"""The experiments on FISH masks at toy size: what they write, what they keep, how a rate is chosen."""

import functools
import json

import jax
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("gin")

from experiments import docstrings, fish_bench, fish_choice, fish_density, fish_problems, fish_workers, lab
from fishjax import data, masks
from fishjax.errors import UsageError

CHOICES = {"FISH": fish_bench.fish, "random": fish_bench.random}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes int32 counts and Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return fish_problems.digits(
            task=lab.Task("mirrored", [data.mirrored]),
            before=lab.Task("upright"),
            config={"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
            base_steps=3,
            data_dir=str(tmp_path_factory.mktemp("data")),
        )


def test_density_is_measured_once_and_reported(problem, tmp_path, capsys):
    run = functools.partial(
        fish_density.run,
        out=str(tmp_path),
        problem=problem,
        seeds=(0, 1),
        steps=4,
        batch_size=8,
        densities=(0.01, 0.1),
        choices=CHOICES,
        mask_rates=(1e-3, 1e-1),
        bitfit_rates=(1e-2,),
        lora_ranks=(1,),
        lora_rates=(1e-2,),
        full_rates=(1e-2,),
    )
    found = run()
    size = sum(x.size for x in jax.tree.leaves(problem.base(0)))
    assert [c["numbers"] for c in found["ways"]["FISH 1 %"]["cells"]] == [round(0.01 * size)] * 2
    assert found["ways"]["full fine-tuning"]["cells"][0]["numbers"] == size
    kept = [json.loads(p.read_text()) for p in (tmp_path / "cells").glob("FISH_1__*_0.json")]
    best = max(kept, key=lambda k: (k["cell"]["validation"], -k["about"]["rate"]))
    assert len(kept) == 2 and found["ways"]["FISH 1 %"]["rate"] == best["about"]["rate"]
    for name in (
        "report.md",
        "results.json",
        "config.gin",
        "plots/mirrored.png",
        "plots/mirrored_FISH_mask.svg",
    ):
        assert (tmp_path / name).stat().st_size > 0 or name == "config.gin"
    assert "| FISH |" in capsys.readouterr().out

    path = tmp_path / "cells" / "BitFit_0.01_1.json"  # a cell that is there is not run again
    cell = json.loads(path.read_text())
    cell["cell"]["test"] = 0.125
    path.write_text(json.dumps(cell))
    assert run()["ways"]["BitFit"]["cells"][1]["test"] == 0.125
    cell["about"]["steps"] = 5  # one of other settings is
    path.write_text(json.dumps(cell))
    assert run()["ways"] == found["ways"]


def test_choices_of_a_mask_and_workers_are_reported(problem, tmp_path, capsys):
    shared = {"problem": problem, "seeds": (0,), "steps": 4, "batch_size": 8, "density": 0.01}
    found = fish_choice.run(
        out=str(tmp_path / "choice"),
        rates=(1e-2,),
        examples=(8, 16),
        estimators=("exact",),
        scopes=("leaf",),
        refresh_every=(2,),
        **shared,
    )
    size = sum(x.size for x in jax.tree.leaves(problem.base(0)))
    counts = {name: way["cells"][0]["numbers"] for name, way in found["ways"].items()}
    assert counts["16 examples"] == counts["random"] == round(0.01 * size)
    assert counts["chosen anew every 2 steps"] > 0.5 * counts["random"]
    assert found["overlap"]["16 examples"] == 1 and 0 < found["overlap"]["8 examples"] < 1
    found = fish_workers.run(
        out=str(tmp_path / "workers"),
        workers=2,
        every=(1, 2),
        mask_rates=(1e-2,),
        dense_rates=(1e-3,),
        **shared,
    )
    sent = {name: way["cells"][0]["sent"]["values"] for name, way in found["ways"].items()}
    assert sent["dense, every 1"] == 2 * sent["dense, every 2"] == 4 * 4 * size
    assert sent["same mask, every 1"] == 4 * 4 * round(0.01 * size)
    assert sent["disjoint masks, every 2"] == sent["same mask, every 2"] > sent["same mask, int8, every 2"]
    for name in ("choice", "workers"):
        assert (tmp_path / name / "plots" / f"{name}.png").stat().st_size > 0
    assert "| same mask, every 1 |" in capsys.readouterr().out


def test_a_gate_that_is_moved_trains_what_either_mask_keeps_and_nothing_else(problem):
    bench, base = fish_bench.make(problem, steps=6, batch_size=8), problem.base(0)
    first, second = masks.split(bench.scores(0, examples=16), 2, density=0.1)
    tuned = bench.tune(base, first, 1e-2, 0, refresh=(lambda params: second, 3))
    moved = jax.tree.map(lambda a, b: a != b, tuned, base)
    assert masks.count(masks.intersection(moved, first)) > 0.9 * masks.count(first)
    assert masks.count(masks.intersection(moved, second)) > 0.9 * masks.count(second)
    assert masks.count(moved) == masks.count(masks.intersection(moved, masks.union(first, second)))


def test_docstrings_are_parsed_cut_and_told_apart():
    texts, labels = docstrings.examples(["rich", "hypothesis"], each=20, words=10)
    assert sorted(labels) == [0] * 20 + [1] * 20 and len(set(texts)) == 40
    assert all(4 <= len(t.split()) <= 10 and "hypothesis" not in t.lower() for t in texts)
    assert (texts, labels) == docstrings.examples(["rich", "hypothesis"], each=20, words=10)
    with pytest.raises(UsageError, match="different docstrings; `each` is 100000"):
        docstrings.examples(["rich"], each=100_000)
    with pytest.raises(UsageError, match="`no_such_package` is not installed"):
        docstrings.examples(["no_such_package"], each=1)
