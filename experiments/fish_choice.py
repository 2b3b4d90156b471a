"""What the choice of a FISH mask depends on: examples, estimator, scope, and whether it is refreshed.

Command:   python -m experiments.fish_choice --gin_file configs/fish_choice.gin
Time:      3 minutes on one core (84 cells of 200 steps); a run that was stopped goes on.
Expected:  experiments/RESULTS.md: a budget for each layer and choosing anew help, more examples do not.

Learning rates are chosen on validation data (first seed), accuracies reported on test data.
"""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin

from experiments import fish_bench, fish_tables
from experiments.fish_bench import Bench, Cell
from experiments.fish_problems import Problem
from experiments.gin_cli import main
from fishjax import masks, patches
from fishjax.types import Mask


def run(
    *,
    out: str,
    problem: Problem,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    density: float,
    rates: Sequence[float],
    examples: Sequence[int],
    estimators: Sequence[str],
    scopes: Sequence[str],
    refresh_every: Sequence[int],
) -> dict[str, Any]:
    """Run all cells; write `results.json` and `report.md` to `out`."""
    start, folder = time.monotonic(), Path(out)
    bench = fish_bench.make(problem, steps=steps, batch_size=batch_size)

    def fixed(chosen: dict[str, Any]) -> tuple[Any, Sequence[float]]:
        choose = lambda bench, seed: fish_bench.fish(bench, seed, density, **chosen)
        return functools.partial(fish_bench.masked, bench, choose), rates

    chosen: dict[str, dict[str, Any]] = {f"best of each {scope}": {"scope": scope} for scope in scopes}
    chosen |= {f"{name} Fisher": {"estimator": name} for name in estimators}
    chosen |= {f"{n} examples": {"examples": n} for n in examples}
    ways = {name: fixed(way) for name, way in chosen.items()}
    ways |= {"random": (functools.partial(fish_bench.masked, bench, _random(density)), rates)}
    ways["what a full training moves most"] = (_after(bench, density), rates)
    for every in refresh_every:
        ways[f"chosen anew every {every} steps"] = (
            functools.partial(_refreshed, bench, density, every),
            rates,
        )
    settings = {**bench.settings, "density": density}
    found = {
        "settings": settings,
        "ways": fish_bench.study(folder, settings, ways, seeds),
        "overlap": _overlaps(bench, density, chosen, seeds[0]),
        "seconds": round(time.monotonic() - start, 1),
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "config.gin").write_text(gin.config_str())
    (folder / "report.md").write_text(lines := fish_tables.choice(found, folder / "plots" / "choice"))
    print(lines)
    return found


def _random(density: float) -> Any:
    return lambda bench, seed: fish_bench.random(bench, seed, density)


def _after(bench: Bench, density: float) -> Any:
    """Choose what a full training moved furthest: a mask that knows the future."""

    @functools.lru_cache(maxsize=1)
    def moved(seed: int) -> Mask:
        base = bench.problem.base(seed)
        tuned = bench.tune(base, masks.by_name(base, ""), 1e-3, seed)
        return masks.movement(base, tuned, density=density, always=bench.problem.always or None)

    return functools.partial(fish_bench.masked, bench, lambda bench, seed: moved(seed))


def _refreshed(bench: Bench, density: float, every: int, rate: float, seed: int) -> Cell:
    """Choose the mask anew on a schedule; what was learnt stays, so the patch grows."""
    problem, base = bench.problem, bench.problem.base(seed)
    choose = lambda params: masks.topk(
        bench.fisher(params, seed), density=density, always=problem.always or None
    )
    mask = fish_bench.fish(bench, seed, density)
    tuned = bench.tune(base, mask, rate, seed, refresh=(choose, every))
    return fish_bench.measure(bench, tuned, patches.num_parameters(patches.diff(base, tuned)))


def _overlaps(bench: Bench, density: float, ways: dict[str, dict[str, Any]], seed: int) -> dict[str, float]:
    """Return how much masks have in common (Jaccard) with that of the most examples."""
    most = fish_bench.fish(bench, seed, density, **list(ways.values())[-1])
    return {n: masks.overlap(fish_bench.fish(bench, seed, density, **way), most) for n, way in ways.items()}


if __name__ == "__main__":
    main("fish_choice.run", (__doc__ or "").splitlines()[0])
