"""The merging experiments as tables in Markdown and as plots: mean and standard deviation over seeds."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishjax import plot

TITLES = {
    "ensemble": "Several fine-tunings of one task",
    "robust": "Robust fine-tuning: from the base to its fine-tuning",
    "donor": "A task of few examples, and donors",
    "several": "All rules over several tasks",
}


def markdown(results: Mapping[str, Sequence[Mapping[str, Any]]], plots: Path) -> str:
    """Return all tables, and draw the plots."""
    lines: list[str] = []
    for name, cells in results.items():
        lines += [f"### {TITLES.get(name, name)}", ""]
        if "table" in cells[0]:
            lines += _several(cells)
        elif "curves" in cells[0]:
            lines += _robust(cells, plots / name)
        else:
            tests = {row: [c["rows"][row] for c in cells] for row in cells[0]["rows"]}
            lines += ["| model | test accuracy |", "|---|---|"]
            lines += [f"| {row} | {spread(values)} |" for row, values in tests.items()]
            label = lambda row: re.sub("(:|,|merged by) ", r"\1\n", row)
            means = {label(row): {"test": float(np.mean(x))} for row, x in tests.items()}
            plot.accuracies(means, plots / name)
            _sweeps(cells, plots)
        lines.append("")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation (of the sample) as text.

    >>> spread([0.25, 0.75])
    '0.500 ± 0.354'
    """
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


def _several(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = cells[0]["tasks"]
    lines = [f"| rule | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for rule in cells[0]["table"]:
        scores = np.array([c["table"][rule] for c in cells])  # [seeds, tasks]
        shown = [f"{x:.3f}" for x in scores.mean(0)] + [spread(scores.mean(1).tolist())]
        lines.append(f"| {rule} | {' | '.join(shown)} |")
    return lines


def _sweeps(cells: Sequence[Mapping[str, Any]], plots: Path) -> None:
    """Draw accuracy over the weight of each donor, mean over seeds."""
    for donor, first in cells[0].get("sweeps", {}).items():
        ways = [way for way in first if way != "weights"]
        curves = {way: np.mean([c["sweeps"][donor][way] for c in cells], axis=0).tolist() for way in ways}
        path = plots / f"donor_{donor.replace(' ', '_')}"
        plot.curves(
            first["weights"],
            curves,
            path,
            labels=(f"target  ←  weight of the donor  →  {donor}", "accuracy of the target (validation)"),
            title=f"Donor: {donor}",
        )


def _robust(cells: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    weights, ways = cells[0]["path"], list(cells[0]["curves"])
    means = {
        (way, where): np.mean([c["curves"][way][where] for c in cells], axis=0)
        for way in ways
        for where in cells[0]["curves"][way]
    }
    plot.curves(
        weights,
        {f"{way}, {where}": values.tolist() for (way, where), values in means.items()},
        path,
        labels=("base  ←  weight of the fine-tuning  →  fine-tuned", "accuracy (test)"),
        title="Robust fine-tuning",
    )
    lines = [f"| weight of the fine-tuning | {' | '.join(f'{w:g}' for w in weights)} |"]
    lines.append("|---" * (len(weights) + 1) + "|")
    for (way, where), values in means.items():
        lines.append(f"| {way}, {where} | {' | '.join(f'{v:.3f}' for v in values)} |")
    return lines
