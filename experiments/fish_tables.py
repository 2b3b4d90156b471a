"""Experiments on FISH masks as tables in Markdown and as plots: mean and standard deviation over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.merging_report import spread
from fishjax import plot


def density(found: Mapping[str, Any], choices: Sequence[str], densities: Sequence[float], path: Path) -> str:
    """Return accuracy against density, and where each mask sits; draw the former."""
    ways = found["ways"]
    share = lambda d: f"{100 * d:g} %"
    lines = [_title(found, f"base {found['base']:.3f}"), ""]
    lines += [f"| trained | {' | '.join(map(share, densities))} |", "|---" * (len(densities) + 1) + "|"]
    curves = {}
    for name in choices:
        some = [ways[f"{name} {share(d)}"] for d in densities]
        curves[name] = [float(np.mean(_tests(way))) for way in some]
        lines.append(f"| {name} | {' | '.join(spread(_tests(way)) for way in some)} |")
        lines.append(f"| learning rate | {' | '.join(_rate(way) for way in some)} |")
    others = [n for n in ways if n in ("BitFit", "full fine-tuning") or n.startswith("LoRA")]
    lines += ["", "| trained | numbers | test accuracy | learning rate |", "|---|---|---|---|"]
    for name in others:
        way = ways[name]
        lines.append(f"| {name} | {way['cells'][0]['numbers']:,} | {spread(_tests(way))} | {_rate(way)} |")
        if name in ("BitFit", "full fine-tuning"):
            curves[name] = [float(np.mean(_tests(way)))] * len(densities)
    lines += ["", "Where the masks of 0.5 % sit (first seed; share of their entries, the five largest):", ""]
    for name, kinds in found["where"].items():
        most = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in list(kinds.items())[:5])
        lines.append(f"- {name}: {most}")
    plot.curves(
        [100 * d for d in densities],
        curves,
        path,
        labels=("% of the weights that are trained", "accuracy (test)"),
        title=found["settings"]["problem"],
        log=True,
    )
    return "\n".join([*lines, "", f"{found['seconds']} s.", ""])


def choice(found: Mapping[str, Any], path: Path) -> str:
    """Return accuracy by how a mask was chosen; draw it against the examples of its Fisher."""
    lines = [_title(found, f"density {100 * found['settings']['density']:g} %"), ""]
    lines += [
        "| mask | test accuracy | validation | learning rate | entries moved | overlap |",
        "|---" * 6 + "|",
    ]
    for name, way in found["ways"].items():
        valid = spread([c["validation"] for c in way["cells"]])
        numbers = np.mean([c["numbers"] for c in way["cells"]])
        overlap = f"{found['overlap'][name]:.2f}" if name in found["overlap"] else ""
        lines.append(
            f"| {name} | {spread(_tests(way))} | {valid} | {_rate(way)} | {numbers:,.0f} | {overlap} |"
        )
    seen = {int(n.split()[0]): n for n in found["ways"] if n.endswith(" examples")}
    mean = lambda name: float(np.mean(_tests(found["ways"][name])))
    curves = {"FISH": [mean(seen[n]) for n in sorted(seen)], "random": [mean("random")] * len(seen)}
    labels = ("examples that the Fisher is of", "accuracy (test)")
    plot.curves(sorted(seen), curves, path, labels=labels, title=found["settings"]["problem"], log=True)
    last = list(found["overlap"])[-1]
    return "\n".join([*lines, "", f"Overlap: Jaccard with `{last}`, first seed. {found['seconds']} s.", ""])


def workers(found: Mapping[str, Any], every: Sequence[int], path: Path) -> str:
    """Return accuracy and bytes sent by how workers merge; draw the former against how often they do."""
    lines = [_title(found, f"{found['settings']['workers']} workers"), ""]
    lines += [
        "| what is merged | bytes a worker sends | indices, once | of dense at every step | test accuracy |"
    ]
    lines += ["|---" * 5 + "|"]
    dense = max(way["cells"][0]["sent"]["values"] for way in found["ways"].values())
    for name, way in found["ways"].items():
        sent = way["cells"][0]["sent"]
        part = (sent["values"] + sent["indices"]) / dense
        cells = [
            name,
            f"{sent['values']:,}",
            f"{sent['indices']:,}",
            f"1/{1 / part:,.0f}",
            spread(_tests(way)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    kinds = dict.fromkeys(name.rpartition(", every ")[0] for name in found["ways"])
    tests = lambda name: _tests(found["ways"][name]) if name in found["ways"] else [np.nan]
    curves = {kind: [float(np.mean(tests(f"{kind}, every {h}"))) for h in every] for kind in kinds}
    labels = ("steps between two merges", "accuracy (test)")
    plot.curves(every, curves, path, labels=labels, title=found["settings"]["problem"], log=True)
    return "\n".join([*lines, "", f"{found['seconds']} s.", ""])


def _title(found: Mapping[str, Any], more: str) -> str:
    s = found["settings"]
    seeds = len(next(iter(found["ways"].values()))["cells"])
    return (
        f"{s['problem']}: {s['steps']} steps of {s['batch_size']} from {s['examples']} examples, {more}; "
        f"test accuracy, mean ± standard deviation over {seeds} seeds."
    )


def _tests(way: Mapping[str, Any]) -> list[float]:
    return [cell["test"] for cell in way["cells"]]


def _rate(way: Mapping[str, Any]) -> str:
    """Show the chosen learning rate; a star where it is an end of those that were tried."""
    ends = (min(way["rates"]), max(way["rates"]))
    return f"{way['rate']:g}" + ("*" if way["rate"] in ends and len(way["rates"]) > 1 else "")
