"""The quickstart's results as a table on the terminal and as Markdown."""

from pathlib import Path
from typing import Any

Rows = list[list[str]]


def tables(results: dict[str, Any], first: str) -> list[tuple[str, list[str], Rows]]:
    """Return (title, header, rows) of each table."""
    share = lambda n: f"{100 * n / results['model_bytes']:.2f} %"
    worlds = list(results["base"])
    made = [
        [c["name"], c["kind"], f"{c['parameters']:,}", f"{100 * c['density']:.2f} %"]
        + [f"{c['bytes']:,}", share(c["bytes"]), f"{c['accuracy_before']:.3f} -> {c['accuracy_after']:.3f}"]
        for c in results["contributors"]
    ]
    beside = [
        [c["name"], f"{c['parameters']:,}", f"{c['accuracy_after']:.3f}"] for c in results["contributors"][:1]
    ] + [[b["name"], f"{b['parameters']:,}", f"{b['accuracy']:.3f}"] for b in results["baselines"]]
    rows = [["base", "", *_scores(results["base"], worlds)]]
    for name, scores in results["merged"].items():
        rows.append([f"merged by {name}", f"{results['merge_weights'][name]:g}", *_scores(scores, worlds)])
    return [
        (
            "Contributors",
            ["name", "kind", "trained", "of the model", "bytes", "of its file", "accuracy on the own world"],
            made,
        ),
        (f"Beside the first, on `{first}`", ["what is trained", "numbers", "accuracy"], beside),
        (
            "Vetting",
            ["patch", "verdict", "exit code"],
            [[v["patch"], v["verdict"], str(v["exit_code"])] for v in results["vet"]],
        ),
        ("Merging", ["model", "weight of the second", *worlds, "mean"], rows),
    ]


def markdown(results: dict[str, Any], first: str) -> str:
    """Return the report as Markdown."""
    lines = [f"# Quickstart, seed {results['seed']}", ""]
    for title, header, rows in tables(results, first):
        lines += [f"## {title}", "", _line(header), _line(["---"] * len(header))]
        lines += [*map(_line, rows), ""]
    lines += ["Accuracies are on test data; merge weights were chosen on validation data.", ""]
    for picture in ("accuracies", "merge_sweep"):
        lines += [f"![{picture}](plots/{picture}.png)", ""]
    return "\n".join([*lines, f"{results['seconds']} s in all.", ""])


def show(results: dict[str, Any], folder: Path, first: str) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in tables(results, first):
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{results['seconds']} s; the report, plots and files are in [bold]{folder}/[/bold]. Next:")
    console.print(
        f"  .venv/bin/fishjax inspect {folder}/patches/{results['contributors'][0]['name']}.safetensors"
    )
    console.print(
        f"  .venv/bin/fishjax vet {folder}/patches/poisoned.safetensors --base {folder}/base "
        f"--tests {folder}/tests --policy configs/vet.yaml",
        soft_wrap=True,
    )


def _scores(scores: dict[str, float], worlds: list[str]) -> list[str]:
    return [f"{scores[w]:.3f}" for w in worlds] + [f"{sum(scores.values()) / len(scores):.3f}"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
