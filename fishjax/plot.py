"""Plots of what people would rather see than read; each is written as PNG and SVG."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fishjax import tree
from fishjax.errors import UsageError
from fishjax.types import Fisher, Mask

if TYPE_CHECKING:
    from fishjax.mesh import Table


def mask_density(mask: Mask, path: str | Path) -> list[Path]:
    """Draw the share of entries that a mask keeps, by layer (rows) and kind of leaf (columns).

    Args:
      mask: bool `[*p]` for every leaf.
      path: where to, without an ending.
    """
    kept = {n: (int(np.count_nonzero(m)), int(m.size)) for n, m in tree.flatten(mask).items()}
    rows, columns, cells = _by_layer(kept)
    share = np.array([[100 * k / n if n else np.nan for k, n in row] for row in cells])
    with _figure(path, (2 + 0.9 * len(columns), 1.6 + 0.4 * len(rows))) as (figure, axes):
        image = axes.imshow(share, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        dark = np.nanmax(share) / 2
        for (i, j), value in np.ndenumerate(share):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color="w" if value < dark else "k")
        figure.colorbar(image, label="% of entries kept")
        axes.set_title("Where the mask sits")
    return _written(path)


def fisher_histograms(fisher: Fisher, path: str | Path) -> list[Path]:
    """Draw, layer by layer, how many entries of a Fisher lie at which power of ten.

    Entries that are exactly zero are counted in the layer's label.

    Args:
      fisher: `[*p]` >= 0 for every leaf.
      path: where to, without an ending.
    """
    rows, edges, heights = _powers_by_layer(fisher)
    with _figure(path, (7, 1.4 + 0.45 * len(rows))) as (_, axes):
        for i, height in enumerate(heights):
            axes.stairs(0.85 * height / max(height.max(), 1) - i, edges, baseline=-i, fill=True, alpha=0.8)
        labels = [f"{name}, {100 * zero:.3g} % zero" if zero else name for name, zero in rows.items()]
        axes.set_yticks([-i for i in range(len(rows))], labels, fontsize=8)
        axes.set_xlabel("log10 of the Fisher information")
        axes.set_title("Diagonal Fisher by layer (each scaled to its peak)")
    return _written(path)


def mesh_table(table: "Table", path: str | Path) -> list[Path]:
    """Draw how many bytes of each kind of leaf a device holds, and how many it would with equal shares.

    Args:
      table: as of `mesh.table`.
      path: where to, without an ending.
    """
    rows = sorted(table.rows, key=lambda row: row.bytes_per_device)
    height = [row.bytes_per_device / 1e6 for row in rows]
    label = lambda row: f"{row.name} ({', '.join(map(_axis, row.spec)) or '-'})"
    with _figure(path, (9, 1.6 + 0.3 * len(rows))) as (_, axes):
        divided = [any(row.spec) for row in rows]
        color = ["tab:red" if row.whole else "tab:blue" if d else "tab:gray" for row, d in zip(rows, divided)]
        axes.barh(range(len(rows)), height, color=color)
        axes.plot(
            [row.bytes / table.devices / 1e6 for row in rows], range(len(rows)), "k|", label="equal share"
        )
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
        axes.set_xlabel("MB on each device (gray: replicated; red: a dimension left whole)")
        mesh = ", ".join(f"{n}={size}" for n, size in table.axes.items())
        axes.set_title(f"{mesh}: {table.bytes_per_device / 1e6:.4g} of {table.bytes / 1e6:.4g} MB each")
        axes.legend(loc="lower right")
    return _written(path)


def merge_sweep(
    weights: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    ends: tuple[str, str],
) -> list[Path]:
    """Draw accuracy over the weight of the second of two models; the end points are the two models.

    Args:
      weights: `[n]` in [0, 1], increasing, at least one of them between.
      curves: `{method: accuracies [n]}`.
      path: where to, without an ending.
      ends: names of the two models.
    """
    with _figure(path, (6.5, 4)) as (_, axes):
        for name, values in curves.items():
            (line,) = axes.plot(weights, values, marker="o", markersize=3.5, label=name)
            best = max((i for i, w in enumerate(weights) if 0 < w < 1), key=lambda i: values[i])
            axes.plot(weights[best], values[best], marker="*", markersize=15, color=line.get_color())
        axes.set_xlabel(f"{ends[0]}  ←  weight of {ends[1]}  →  {ends[1]}")
        axes.set_ylabel("accuracy, mean of both worlds (validation)")
        axes.set_title("Merging: a star marks the weight that is chosen")
        axes.grid(alpha=0.3)
        axes.legend()
    return _written(path)


def curves(
    xs: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    labels: tuple[str, str],
    title: str,
    log: bool = False,
) -> list[Path]:
    """Draw several lines over one axis.

    Args:
      xs: `[n]`.
      lines: `{name: values [n]}`.
      path: where to, without an ending.
      labels: of the axes.
      log: whether the first axis is logarithmic.
    """
    with _figure(path, (6.5, 4)) as (_, axes):
        for name, values in lines.items():
            axes.plot(xs, values, marker="o", markersize=3.5, label=name)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _written(path)


def accuracies(table: Mapping[str, Mapping[str, float]], path: str | Path) -> list[Path]:
    """Draw accuracies as grouped bars: a group for each model, a bar for each world.

    Args:
      table: `{model: {world: accuracy}}`, each model with the same worlds.
      path: where to, without an ending.
    """
    worlds = list(next(iter(table.values())))
    with _figure(path, (1.5 + 1.3 * len(table), 4)) as (_, axes):
        width = 0.8 / len(worlds)
        for i, world in enumerate(worlds):
            at = np.arange(len(table)) + (i - (len(worlds) - 1) / 2) * width
            bars = axes.bar(at, [row[world] for row in table.values()], width, label=world)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.set_xticks(range(len(table)), list(table))
        axes.set_ylim(0, 1.08)
        axes.set_ylabel("accuracy (test)")
        axes.legend(loc="upper left")
    return _written(path)


def _axis(entry: str | tuple[str, ...] | None) -> str:
    """Write one entry of a PartitionSpec."""
    return "-" if entry is None else entry if isinstance(entry, str) else "+".join(entry)


def _layer(name: str) -> str:
    """Return the layer of a leaf: its name up to the first number, else its first part."""
    found = re.match(r".*?\d+(?=\.)|[^.]+", name)
    return found[0] if found else name


def _natural(text: str) -> list:
    """Sort key that puts `block_2` before `block_10`."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]


def _powers_by_layer(fisher: Fisher) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Return `{layer: share of zeros}`, edges in powers of ten `[61]` and counts by layer `[rows, 60]`."""
    layers: dict[str, list[np.ndarray]] = {}
    for name, leaf in tree.flatten(fisher).items():
        layers.setdefault(_layer(name), []).append(np.asarray(leaf, np.float32).reshape(-1))
    entries = {name: np.concatenate(layers[name]) for name in sorted(layers, key=_natural)}
    powers = [np.log10(x[x > 0]) for x in entries.values()]
    if not any(map(len, powers)):
        raise UsageError("the Fisher is zero everywhere; there is nothing to draw")
    low = min(p.min() for p in powers if len(p))
    high = max(p.max() for p in powers if len(p))
    edges = np.linspace(low, max(high, low + 1e-3), 61)
    rows = {name: float(np.count_nonzero(x == 0) / max(1, x.size)) for name, x in entries.items()}
    return rows, edges, np.stack([np.histogram(p, edges)[0] for p in powers])


def _by_layer(kept: Mapping[str, tuple[int, int]]):
    """Return layers, kinds of leaf, and a table of (kept, size)."""
    places = {n: (_layer(n), n[len(_layer(n)) :].strip(".") or "-") for n in kept}
    rows = sorted({r for r, _ in places.values()}, key=_natural)
    columns = sorted({c for _, c in places.values()}, key=_natural)
    cells = [[(0, 0) for _ in columns] for _ in rows]
    for name, (row, column) in places.items():
        cells[rows.index(row)][columns.index(column)] = kept[name]
    return rows, columns, cells


@contextlib.contextmanager
def _figure(path: str | Path, size: tuple[float, float]) -> Iterator:
    """Give a figure to draw on and write it twice."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('plots need matplotlib: pip install "fishjax[plot]"') from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.add_subplot()
    for file in _written(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        # No date and no random ids: the same plot has the same bytes.
        keep = {"Date": None} if file.suffix == ".svg" else {"Software": None}
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "fishjax"}):
            figure.savefig(file, dpi=140, metadata=keep)


def _written(path: str | Path) -> list[Path]:
    return [Path(f"{path}{ending}") for ending in (".png", ".svg")]
