"""The results of `experiments.tfew` as tables in the form of T-Few's, and plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fishjax import plot, train

Rows = list[list[str]]


def write(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md and the plots."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(results))
    means = {name: {"mean of the tasks": mean(cells)} for name, cells in results["methods"].items()}
    zero = {"mean of the tasks": float(np.mean([np.median(a) for a in results["zero_shot"].values()]))}
    plot.accuracies({"no training": zero, **means}, folder / "plots" / "methods")


def mean(cells: dict[str, list[dict[str, Any]]]) -> float:
    """Return the mean over tasks of the medians over seeds and templates."""
    return float(np.mean([_spread(several).median for several in cells.values()]))


def markdown(results: dict[str, Any]) -> str:
    """Return the report."""
    settings, flops = results["settings"], results["inference_flops"]
    tasks = list(results["chance"])
    cost, single = [], lambda cells, what: next(iter(cells.values()))[0][what]
    cost.append(["no training", _percent(_zero(results)), f"{flops:.1e}", "0", "0", "0"])
    for name, cells in results["methods"].items():
        trained = single(cells, "parameters")
        row = [name, _percent(mean(cells)), f"{flops:.1e}", f"{single(cells, 'training_flops'):.1e}"]
        cost.append([*row, f"{trained:,}", f"{single(cells, 'bytes'):,}"])
    accuracy = [["chance", *(_percent(results["chance"][t]) for t in tasks), ""]]
    zero = [_percent(np.median(results["zero_shot"][t])) for t in tasks]
    accuracy.append(["no training", *zero, _percent(_zero(results))])
    for name, cells in results["methods"].items():
        spreads = [_spread(cells[t]) for t in tasks]
        told = [f"{_percent(s.median)} ({_percent(s.iqr)})" for s in spreads]
        accuracy.append([name, *told, _percent(mean(cells))])
    mixture = [[n, _percent(a)] for n, a in results["mixture"].items()]
    columns = ["method", "accuracy", "inference FLOPs", "training FLOPs", "trained numbers", "bytes on disk"]
    lines = [
        f"{len(settings['seeds'])} seeds, {settings['shots']} shots, {settings['steps']} steps, two "
        f"templates a task, {settings['tests']} examples of the {settings['split']} split; a model of "
        f"{results['model_parameters']:,} parameters.",
        "",
        *_table(columns, cost),
        "",
        "Accuracy in percent, mean over tasks of the median over seeds and templates; FLOPs as XLA counts "
        "the program before its optimisation, inference of one example with its choices.",
        "",
        *_table(["method", *tasks, "mean"], accuracy),
        "",
        "Median (interquartile range) over seeds and templates.",
        "",
        *_table(["task of the mixture", "accuracy of the base"], mixture),
        "",
        "![methods](plots/methods.png)",
        "",
    ]
    return "\n".join(lines)


def _zero(results: dict[str, Any]) -> float:
    return float(np.mean([np.median(a) for a in results["zero_shot"].values()]))


def _spread(several: list[dict[str, Any]]) -> train.Spread:
    return train.spread([cell["accuracy"] for cell in several])


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _table(header: list[str], rows: Rows) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(header), line(["---"] * len(header)), *map(line, rows)]
