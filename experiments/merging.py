"""Merging, measured on digits: ensembles, robust fine-tuning, donors, and all rules over several tasks.

Command:   python -m experiments.merging --gin_file configs/merging.gin
Time:      11 minutes on one core; a run that was stopped goes on (each seed of each is kept).
Expected:  experiments/RESULTS.md: Fisher is as good as the average for ensembles, RegMean best over tasks.

The figures of Matena and Raffel (arXiv 2111.09832, sections 4.1 to 4.3) on data at hand. Whatever is chosen
(weights, floors, scales) is chosen on validation data; every accuracy that is reported is on test data.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np

from experiments import merging_report
from experiments.gin_cli import main
from experiments.lab import Lab, Task, draw, make
from fishjax import data, merge
from fishjax.progress import track
from fishjax.types import Fisher, Params

Result = dict[str, Any]


def run(
    *,
    out: str,
    seeds: Sequence[int],
    config: Mapping[str, Any],
    learning_rate: float,
    batch_size: int,
    experiments: Mapping[str, Callable[[Lab, int], Result]],
) -> dict[str, list[Result]]:
    """Run each experiment for each seed; write results, report, plots and the gin config to `out`."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lab = make(
        config, data_dir=str(folder.parent / "data"), learning_rate=learning_rate, batch_size=batch_size
    )
    settings = gin.config_str()
    cells = [(name, seed) for name in experiments for seed in seeds]
    results: dict[str, list[Result]] = {name: [] for name in experiments}
    for name, seed in track(cells, description="merging experiments"):
        cell = folder / "cells" / f"{name}_{seed}.json"
        kept = json.loads(cell.read_text()) if cell.exists() else {}
        if kept.get("settings") != settings:
            kept = {"settings": settings, "result": experiments[name](lab, seed)}
            cell.parent.mkdir(exist_ok=True)
            cell.write_text(json.dumps(kept))
        results[name].append(kept["result"])
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "config.gin").write_text(settings)
    (folder / "report.md").write_text(merging_report.markdown(results, folder / "plots"))
    print((folder / "report.md").read_text())
    return results


def ensemble(
    lab: Lab, seed: int, *, task: Task, members: int, examples: int, base_steps: int, steps: int
) -> Result:
    """Merge fine-tunings of one task that differ in their examples and their order (section 4.1)."""
    base = _base(lab, seed, base_steps)
    rows, test = task.of(lab.digits["train"]), task.of(lab.digits["test"])
    parts = [draw(rows, examples, seed * 100 + i) for i in range(members)]
    tuned = [lab.tune(base, part, steps=steps, seed=seed * 100 + i) for i, part in enumerate(parts)]
    fishers = [lab.fisher(params, part) for params, part in zip(tuned, parts)]
    together = np.mean([lab.probabilities(params, test) for params in tuned], axis=0)
    shown = {
        "base": lab.accuracy(base, test),
        "one model": float(np.mean([lab.accuracy(params, test) for params in tuned])),
        "merged by average": lab.accuracy(merge.average(tuned), test),
        "merged by Fisher": lab.accuracy(merge.fisher(tuned, fishers=fishers, floor=0.0), test),
        "ensemble of outputs": float((together.argmax(-1) == test["label"]).mean()),
    }
    return {"rows": shown}


def robust(
    lab: Lab,
    seed: int,
    *,
    broad: Sequence[Task],
    task: Task,
    base_steps: int,
    steps: int,
    points: int,
) -> Result:
    """Go from a base that knows many shifts to its fine-tuning on one, by both merges (section 4.2).

    The base sees half of the training data in each shift, the fine-tuning all of it in one. The path is of
    test accuracies, in distribution and shifted; nothing is chosen by them.
    """
    half = draw(lab.digits["train"], data.examples(lab.digits["train"]) // 2, seed)
    mixture = data.concatenate(*(shift.of(half) for shift in broad))
    own = task.of(lab.digits["train"])
    base = lab.tune(lab.init(seed), mixture, steps=base_steps, seed=seed)
    tuned = lab.tune(base, own, steps=steps, seed=seed)
    fishers = [lab.fisher(base, draw(mixture, 256, seed)), lab.fisher(tuned, draw(own, 256, seed))]
    tests = {t.name: t.of(lab.digits["test"]) for t in (task, *broad) if t.name != task.name}
    path = np.linspace(0, 1, points).tolist()
    curves: dict[str, Any] = {}
    for way, merged in _both([base, tuned], fishers).items():
        models = [merged([1 - w, w]) for w in path]
        own_test = task.of(lab.digits["test"])
        curves[way] = {
            "in distribution": [lab.accuracy(m, own_test) for m in models],
            "shifted": [float(np.mean([lab.accuracy(m, rows) for rows in tests.values()])) for m in models],
        }
    return {"path": path, "curves": curves}


def donor(
    lab: Lab,
    seed: int,
    *,
    task: Task,
    donors: Sequence[Task],
    examples: int,
    base_steps: int,
    donor_steps: int,
    steps: int,
    points: int,
) -> Result:
    """Improve a task with few examples by a model of another task with many (section 4.3)."""
    base = _base(lab, seed, base_steps)
    few = draw(task.of(lab.digits["train"]), examples, seed)
    validation, test = (task.of(lab.digits[s]) for s in ("validation", "test"))
    alone = lab.tune(base, few, steps=steps, seed=seed)
    select = lambda params: lab.accuracy(params, validation)
    report = lambda params: lab.accuracy(params, test)
    own_fisher = lab.fisher(alone, few)
    result: Result = {"base": report(base), "target alone": report(alone)}
    sweeps: dict[str, Any] = {}
    for other in donors:
        rows = other.of(lab.digits["train"])
        taught = lab.tune(base, rows, steps=donor_steps, seed=seed)
        fishers = [own_fisher, lab.fisher(taught, draw(rows, 256, seed))]
        pair = [alone, taught]
        result[f"{other.name}: donor itself"] = report(taught)
        result[f"{other.name}: donor, then target"] = report(lab.tune(taught, few, steps=steps, seed=seed))
        for way, merged in _both(pair, fishers).items():
            found = merge.search.grid(merged, parents=pair, select=select, points=points)
            result[f"{other.name}: merged by {way}"] = report(found.params)
            trials = sorted(found.trials, key=lambda t: t.weights[1])
            sweep = sweeps.setdefault(other.name, {"weights": [t.weights[1] for t in trials]})
            sweep[way] = [t.score for t in trials]  # on validation data
    return {"rows": result, "sweeps": sweeps}


def several(
    lab: Lab,
    seed: int,
    *,
    tasks: Sequence[Task],
    base_steps: int,
    steps: int,
    floors: Sequence[float],
    scales: Sequence[float],
    densities: Sequence[float],
    alphas: Sequence[float],
) -> Result:
    """Merge one fine-tuning of each task by every rule; rows are rules, columns are tasks."""
    base = _base(lab, seed, base_steps)
    rows = [task.of(lab.digits["train"]) for task in tasks]
    tuned = [lab.tune(base, r, steps=steps, seed=seed) for r in rows]
    some = [draw(r, 256, seed) for r in rows]
    familiar = draw(lab.digits["train"], 256, seed)
    validation = [task.of(lab.digits["validation"]) for task in tasks]
    test = [task.of(lab.digits["test"]) for task in tasks]
    near = {"base": base}
    floored = [{"floor": f, "normalize": n} for f in floors for n in (False, True)]
    thinned = [{"density": d, "scale": s, **near} for d in densities for s in scales]
    ways: dict[str, tuple[Callable[..., Params], list[dict[str, Any]]]] = {
        "average": (merge.average, [{}]),
        "task arithmetic": (merge.task_arithmetic, [{"scale": s, **near} for s in scales]),
        "TIES": (merge.ties, thinned),
        "DARE": (merge.dare, thinned),
        "breadcrumbs": (merge.breadcrumbs, thinned),
        "model stock": (merge.model_stock, [near]),
        "RegMean": (
            merge.regmean,
            [{"alpha": a, "axis": 0, "grams": [lab.grams(*p) for p in zip(tuned, some)]} for a in alphas],
        ),
    }
    for name in ("exact", "empirical", "legacy_argmax", "legacy_sqrt_sum"):
        fishers = [lab.fisher(params, part, name) for params, part in zip(tuned, some)]
        ways[f"Fisher, {name}"] = (merge.fisher, [{**o, "fishers": fishers} for o in floored])
        if name == "exact":
            known = {"fishers": fishers, "base_fisher": lab.fisher(base, familiar), **near}
            matched = [{"floor": f, "weights": [s] * len(tasks), **known} for f in floors for s in scales]
            ways["gradient matching"] = (merge.gradient_matching, matched)
    scores = lambda params, split: [lab.accuracy(params, r) for r in split]
    table = {"base": scores(base, test)}
    table["one model a task"] = [lab.accuracy(params, r) for params, r in zip(tuned, test)]
    chosen = {}
    for name, (method, options) in ways.items():
        trials = [np.mean(scores(method(tuned, **o), validation)) for o in options]
        best = options[int(np.argmax(trials))]
        table[name] = scores(method(tuned, **best), test)
        chosen[name] = {k: v for k, v in best.items() if isinstance(v, (int, float)) or k == "weights"}
    return {"tasks": [t.name for t in tasks], "table": table, "chosen": chosen}


def _base(lab: Lab, seed: int, steps: int) -> Params:
    """Return a model that knows the upright digits."""
    return lab.tune(lab.init(seed), lab.digits["train"], steps=steps, seed=seed)


def _both(pair: Sequence[Params], fishers: Sequence[Fisher]) -> dict[str, merge.search.Merge]:
    """Return the isotropic and the Fisher merge of two models as functions of their weights."""
    return {
        "average": lambda share: merge.average(pair, weights=share),
        "Fisher": lambda share: merge.fisher(pair, fishers=fishers, weights=share, floor=0.0),
    }


if __name__ == "__main__":
    main("merging.run", (__doc__ or "").splitlines()[0])
